//! Rows of x for several matrices at once: each form that some matrix reads is made once.
use crate::activations::{Buffer, Form, Rows};
use crate::gemm::Kernels;
use crate::packed::PackedMatrix;

/// Memory of rows: of bf16, and of int8 for weights in groups of 32, 64 and 128.
pub(crate) type Buffers = [Buffer; FORMS.len()];

/// The forms that are made of x; x itself is one more.
const FORMS: [Form; 4] = [Form::Bf16, Form::Int8 { group: 32 }, Form::Int8 { group: 64 }, Form::Int8 { group: 128 }];

/// x in the forms that some matrix reads.
pub(crate) struct Inputs<'a> {
    float: Rows<'a>,
    made: [Option<Rows<'a>>; FORMS.len()],
}

impl<'a> Inputs<'a> {
    /// x `[rows, k]` for matrices with k columns.
    pub(crate) fn new<'e>(
        kernels: &Kernels,
        x: &'a [f32],
        k: usize,
        buffers: &'a mut Buffers,
        matrices: impl Iterator<Item = &'e PackedMatrix>,
    ) -> Self {
        let mut wanted = [false; FORMS.len()];
        for matrix in matrices {
            if let Some(place) = Self::place(Form::new(kernels.activations, matrix.format())) {
                wanted[place] = true;
            }
        }
        let mut made = [None; FORMS.len()];
        for (place, buffer) in buffers.iter_mut().enumerate().filter(|(place, _)| wanted[*place]) {
            made[place] = Some(kernels.rows(FORMS[place], x, k, buffer));
        }
        Self { float: Rows::new(Form::Float, k, bytemuck::cast_slice(x)), made }
    }

    fn place(form: Form) -> Option<usize> {
        FORMS.iter().position(|made| *made == form)
    }

    /// The rows for one of the matrices.
    pub(crate) fn of(&self, form: Form) -> Rows<'a> {
        match Self::place(form) {
            Some(place) => self.made[place].expect("made for every matrix"),
            None => self.float,
        }
    }
}
