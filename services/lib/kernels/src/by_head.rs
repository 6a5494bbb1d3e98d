//! Products of each head's part of x with that head's own matrix, in one region (latent attention's absorbed weights).
//!
//! Shapes: x `[m, heads, k]`, for each head a matrix `[n, k]`, out `[m, heads, n]`. As `gemm` otherwise, and a head's
//! results are those of [`Kernels::linear`] with its columns of x, to the bit. Outline: x is `[m · heads, k]`, so each
//! form that some matrix reads is made once, of all heads' rows; a task is (head, run of panels), reads every heads-th
//! row and writes to the head's columns.
use crate::activations::{Form, with};
use crate::gemm::{Kernels, Part, ROWS, Shared};
use crate::inputs::Inputs;
use crate::packed::PackedMatrix;
use std::cell::Cell;

thread_local! {
    /// The caller's parts, none while they do not run.
    static PARTS: Cell<Vec<Part<'static>>> = Cell::default();
}

impl Kernels {
    /// `out[m, h, n] = x[m, h, k] · W_hᵀ + bias_h[n]`, where `heads` are the W and biases.
    ///
    /// # Panics
    /// When the matrices' shapes differ, or a slice's length is not what `m` and they say.
    pub fn linear_by_head<'w>(
        &self,
        heads: impl ExactSizeIterator<Item = (&'w PackedMatrix, Option<&'w [f32]>)> + Clone,
        x: &[f32],
        m: usize,
        out: &mut [f32],
    ) {
        let Some((first, _)) = heads.clone().next() else { return };
        let (n, k) = (first.rows(), first.cols());
        let width = heads.len() * n;
        assert_eq!(x.len(), m * heads.len() * k, "x is [m, heads, k]");
        assert_eq!(out.len(), m * width, "out is [m, heads, n]");
        for (weight, bias) in heads.clone() {
            assert_eq!((weight.rows(), weight.cols()), (n, k), "all matrices are [n, k]");
            assert!(bias.is_none_or(|b| b.len() == n), "bias is [n]");
        }
        with(&ROWS, |buffers| {
            let inputs = Inputs::new(self, x, k, buffers, heads.clone().map(|(weight, _)| weight));
            let out = Shared::new(out);
            let count = heads.len();
            let parts = heads.enumerate().map(|(head, (weight, bias))| {
                let form = Form::new(self.activations, weight.format());
                let (x, column) = (inputs.of(form), head * n);
                Part { weight, bias, x, form, m, heads: count, head, out, width, column }
            });
            with(&PARTS, |kept| {
                let mut all: Vec<Part<'_>> = std::mem::take(kept);
                all.extend(parts);
                self.run_parts(&all);
                all.clear();
                // std collects in place where layouts agree; the model's test of allocations holds it to that
                *kept = all.into_iter().map(|_| unreachable!("it is empty")).collect();
            });
        });
    }
}
