//! Row by row operations, split over the threads where there is enough to do.
use crate::gemm::{Kernels, Shared};

/// Values that are worth a task of their own: a few microseconds of the cheapest operation.
const TASK: usize = 1 << 13;

impl Kernels {
    /// Calls `body(first row, rows)` for runs of whole rows of `values` `[rows, cols]`, each row in one run. What is
    /// done to a row must depend on that row alone: runs are cut by the number of threads.
    ///
    /// # Panics
    /// When `values` are no whole rows.
    pub fn by_rows(&self, values: &mut [f32], cols: usize, body: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        if values.is_empty() {
            return;
        }
        assert!(cols > 0 && values.len().is_multiple_of(cols), "values are [rows, {cols}]");
        let rows = values.len() / cols;
        let most = self.pool.threads() * 4;
        let tasks = (values.len() / TASK).clamp(1, most).min(rows);
        if tasks == 1 {
            return body(0, values);
        }
        let per_task = rows.div_ceil(tasks);
        let shared = Shared::new(values);
        self.pool.run(rows.div_ceil(per_task), &|task| {
            let first = task * per_task;
            let count = per_task.min(rows - first);
            // SAFETY: a task's rows are its own.
            body(first, unsafe { shared.slice(first * cols, count * cols) });
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_in_one_run_whatever_the_threads() {
        for threads in [1, 2, 5] {
            let kernels = Kernels::new(threads);
            for (rows, cols) in [(1, 1), (1, 100_000), (3, 7), (200, 333), (5_000, 64)] {
                let mut values = vec![0f32; rows * cols];
                kernels.by_rows(&mut values, cols, &|first, run| {
                    for (row, values) in run.chunks_exact_mut(cols).enumerate() {
                        values.iter_mut().for_each(|value| *value += (first + row + 1) as f32);
                    }
                });
                let mut numbered = values.chunks_exact(cols).enumerate();
                assert!(numbered.all(|(row, values)| values.iter().all(|value| *value == (row + 1) as f32)));
            }
        }
        Kernels::new(2).by_rows(&mut [], 3, &|_, _| panic!("there are no rows"));
    }
}
