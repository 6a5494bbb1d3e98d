//! Feed-forward networks: dense ones, and experts in each of the layouts that files have.
use super::{Role, RowOf, Stored, Weights, owned, transposed};
use crate::Result;
use crate::backend::{FfnMatrices, Matrix};
use crate::source::Dtype;
use crate::spec::Dense;
use crate::spec::names::{ExpertNames, at_expert, at_layer};
use std::sync::Arc;

/// One expert of a layer's stack.
#[derive(Clone, Copy)]
struct Member {
    expert: usize,
    experts: usize,
}

impl<'a> Weights<'a> {
    /// A dense network under names gate, up, down.
    pub fn network(&self, names: &[&str; 3], layer: usize, form: Dense) -> Result<FfnMatrices<'a>> {
        let [gate, up, down] = names.map(|name| at_layer(name, layer));
        self.separate(&[gate, up, down], form)
    }

    fn separate(&self, [gate, up, down]: &[String; 3], form: Dense) -> Result<FfnMatrices<'a>> {
        let (hidden, inner) = (self.spec.hidden, form.intermediate);
        Ok(FfnMatrices {
            gate: if form.gated { Some(self.matrix(gate, inner, hidden, Role::Body)?) } else { None },
            up: self.matrix(up, inner, hidden, Role::Body)?,
            down: self.matrix(down, hidden, inner, Role::Body)?,
            gate_bias: self.bias(gate, inner, form.bias && form.gated)?,
            up_bias: self.bias(up, inner, form.bias)?,
            down_bias: self.bias(down, hidden, form.bias)?,
            activation: form.activation,
        })
    }

    /// One expert of a layer that has `experts`.
    pub fn expert(&self, layer: usize, expert: usize, experts: usize, form: Dense) -> Result<FfnMatrices<'a>> {
        let member = Member { expert, experts };
        match self.spec.names.experts {
            ExpertNames::Separate(names) => self.separate(&names.map(|name| at_expert(name, layer, expert)), form),
            ExpertNames::Stacked(names) => self.stacked(&names.map(|name| at_layer(name, layer)), member, form),
            ExpertNames::Fused([gate_up, down]) => {
                self.fused(&at_layer(gate_up, layer), &at_layer(down, layer), member, form)
            }
            ExpertNames::Interleaved([gate_up, down]) => {
                self.interleaved(&at_layer(gate_up, layer), &at_layer(down, layer), member, form)
            }
        }
    }

    /// One matrix of a stack `tensor` `[experts, stored_rows, cols]`.
    fn member(
        &self,
        name: String,
        (tensor, stored_rows): (&str, usize),
        (rows, cols): (usize, usize),
        member: Member,
        row_of: Option<RowOf<'a>>,
    ) -> Result<Matrix<'a>> {
        let (tensor, shape) = (tensor.to_owned(), vec![member.experts, stored_rows, cols]);
        self.stored(Stored { name, tensor, shape, index: member.expert, rows, cols, row_of }, Role::Body)
    }

    fn stacked(&self, [gate, up, down]: &[String; 3], member: Member, form: Dense) -> Result<FfnMatrices<'a>> {
        let (hidden, inner) = (self.spec.hidden, form.intermediate);
        let matrix = |stack: &str, rows, cols| {
            let name = format!("{stack}.{}.weight", member.expert);
            self.member(name, (&format!("{stack}.weight"), rows), (rows, cols), member, None)
        };
        let bias = |stack: &str, rows: usize| {
            let (name, shape) = (format!("{stack}.bias"), [member.experts, rows]);
            form.bias.then(|| self.slice(&name, &shape, member.expert * rows, rows)).transpose()
        };
        Ok(FfnMatrices {
            gate: Some(matrix(gate, inner, hidden)?),
            up: matrix(up, inner, hidden)?,
            down: matrix(down, hidden, inner)?,
            gate_bias: bias(gate, inner)?,
            up_bias: bias(up, inner)?,
            down_bias: bias(down, hidden)?,
            activation: form.activation,
        })
    }

    fn fused(&self, gate_up: &str, down: &str, member: Member, form: Dense) -> Result<FfnMatrices<'a>> {
        let (hidden, inner, expert) = (self.spec.hidden, form.intermediate, member.expert);
        let half = |part: &str, first: usize| {
            let name = format!("{gate_up}.{expert}.{part}.weight");
            let row_of: RowOf<'a> = Arc::new(move |row| first + row);
            self.member(name, (&format!("{gate_up}.weight"), 2 * inner), (inner, hidden), member, Some(row_of))
        };
        let name = format!("{down}.{expert}.weight");
        Ok(FfnMatrices {
            gate: Some(half("gate", 0)?),
            up: half("up", inner)?,
            down: self.member(name, (&format!("{down}.weight"), hidden), (hidden, inner), member, None)?,
            gate_bias: None,
            up_bias: None,
            down_bias: None,
            activation: form.activation,
        })
    }

    fn interleaved(&self, gate_up: &str, down: &str, member: Member, form: Dense) -> Result<FfnMatrices<'a>> {
        let (hidden, inner) = (self.spec.hidden, form.intermediate);
        let Member { expert, experts } = member;
        let names = [
            format!("{gate_up}.{expert}.gate.weight"),
            format!("{gate_up}.{expert}.up.weight"),
            format!("{down}.{expert}.weight"),
        ];
        let [gate, up, down_matrix] = self.turned(gate_up, down, names, member, inner)?;
        let (mut gate_bias, mut up_bias, mut down_bias) = (None, None, None);
        if form.bias {
            let name = format!("{gate_up}_bias");
            let both = self.slice(&name, &[experts, 2 * inner], expert * 2 * inner, 2 * inner)?;
            gate_bias = Some(both.iter().step_by(2).copied().collect());
            up_bias = Some(both.iter().skip(1).step_by(2).copied().collect());
            down_bias = Some(self.slice(&format!("{down}_bias"), &[experts, hidden], expert * hidden, hidden)?);
        }
        let activation = form.activation;
        Ok(FfnMatrices { gate: Some(gate), up, down: down_matrix, gate_bias, up_bias, down_bias, activation })
    }

    /// Gate, up and down of stacks `[experts, hidden, 2 inner]` and `[experts, inner, hidden]`, whose inputs are rows;
    /// in MXFP4 outputs are.
    fn turned(
        &self,
        gate_up: &str,
        down: &str,
        [gate_name, up_name, down_name]: [String; 3],
        Member { expert, experts }: Member,
        inner: usize,
    ) -> Result<[Matrix<'a>; 3]> {
        let (hidden, role) = (self.spec.hidden, Role::Body);
        if let Some(gate) = self.ready(&gate_name, inner, hidden, role)? {
            let ready = |name: &str, rows, cols| {
                let matrix = self.ready(name, rows, cols, role)?;
                matrix.ok_or_else(|| self.fail(name, "is missing"))
            };
            return Ok([gate, ready(&up_name, inner, hidden)?, ready(&down_name, hidden, inner)?]);
        }
        if self.source.info(gate_up).is_some_and(|info| info.dtype == Dtype::Mxfp4) {
            let member = Member { expert, experts };
            let half = |name, part: usize| {
                let row_of: RowOf<'a> = Arc::new(move |row| 2 * row + part);
                self.member(name, (gate_up, 2 * inner), (inner, hidden), member, Some(row_of))
            };
            let down = self.member(down_name, (down, hidden), (hidden, inner), member, None)?;
            return Ok([half(gate_name, 0)?, half(up_name, 1)?, down]);
        }
        let read = |tensor: &str, shape: [usize; 3]| {
            let format = self.format(self.dtype(tensor, &shape)?, None, role);
            let size = shape[1] * shape[2];
            let values = self.slice(tensor, &shape, expert * size, size)?;
            Ok::<_, crate::Error>((transposed(&values, shape[1], shape[2]), format))
        };
        let (rows, format) = read(gate_up, [experts, hidden, 2 * inner])?;
        let every_second = |first: usize| rows.chunks_exact(hidden).skip(first).step_by(2).flatten().copied().collect();
        let (gate, up) = (every_second(0), every_second(1));
        let (down_rows, down_format) = read(down, [experts, inner, hidden])?;
        let gate_up = gate_up.to_owned();
        Ok([
            owned(gate_name, gate_up.clone(), gate, (inner, hidden), format),
            owned(up_name, gate_up, up, (inner, hidden), format),
            owned(down_name, down.to_owned(), down_rows, (hidden, inner), down_format),
        ])
    }
}
