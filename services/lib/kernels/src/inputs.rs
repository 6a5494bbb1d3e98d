//! Rows of x for several matrices at once: each form that some matrix reads is made once.
use crate::activations::{Buffer, Form, Rows};
use crate::gemm::Kernels;
use crate::packed::PackedMatrix;

/// Memory of rows for weights in groups of 32, 64 and 128.
pub(crate) type Buffers = [Buffer; 3];

/// x in the forms that some matrix reads.
pub(crate) struct Inputs<'a> {
    float: Rows<'a>,
    int8: [Option<Rows<'a>>; 3],
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
        let mut wanted = [false; 3];
        for matrix in matrices {
            if let Form::Int8 { group } = Form::new(kernels.activations, matrix.format()) {
                wanted[Self::place(group)] = true;
            }
        }
        let mut int8 = [None; 3];
        for (place, buffer) in buffers.iter_mut().enumerate().filter(|(place, _)| wanted[*place]) {
            int8[place] = Some(kernels.rows(Form::Int8 { group: 32 << place }, x, k, buffer));
        }
        Self { float: Rows::new(Form::Float, k, bytemuck::cast_slice(x)), int8 }
    }

    fn place(group: usize) -> usize {
        match group {
            32 => 0,
            64 => 1,
            128 => 2,
            _ => unreachable!("no matrix is packed in groups of {group}"),
        }
    }

    /// The rows for one of the matrices.
    pub(crate) fn of(&self, form: Form) -> Rows<'a> {
        match form {
            Form::Float => self.float,
            Form::Int8 { group } => self.int8[Self::place(group)].expect("made for every matrix"),
        }
    }
}
