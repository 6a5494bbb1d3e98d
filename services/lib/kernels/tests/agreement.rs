//! Every instruction set against the packed matrix's own rows, and every row alone against the row in a batch.
use moesaic_kernels::{
    Activation, AlignedBytes, AttentionCall, AttentionSequence, Error, ExpertWeights, Format, Isa, Kernels, KvFormat,
    KvLayer, KvShape, PackedMatrix, Storage,
};
use std::sync::Arc;

mod common;
use common::{FORMATS, noise, pack};

fn product_f64(w: &PackedMatrix, x: &[f32], m: usize) -> Vec<f64> {
    let mut row = vec![0.0; w.cols()];
    let mut out = vec![0.0; m * w.rows()];
    for n in 0..w.rows() {
        w.dequantize_row(n, &mut row);
        for i in 0..m {
            let x = &x[i * w.cols()..(i + 1) * w.cols()];
            out[i * w.rows() + n] = x.iter().zip(&row).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        }
    }
    out
}

#[test]
fn products_equal_the_dequantized_rows_on_every_instruction_set() {
    for isa in Isa::available() {
        let kernels = Kernels::with_isa(2, isa);
        for format in FORMATS {
            for (n, k) in [(1, 8), (7, 24), (33, 40), (64, 64), (100, 130), (31, 257)] {
                for m in [1, 2, 3, 4, 5, 6, 7, 8, 9, 23, 33] {
                    let w = pack(format, n, k, &noise(1, n * k));
                    let (x, bias) = (noise(2, m * k), noise(3, n));
                    let mut out = vec![f32::NAN; m * n];
                    kernels.linear(&w, &x, m, Some(&bias), &mut out);
                    let want = product_f64(&w, &x, m);
                    for (i, (got, want)) in out.iter().zip(&want).enumerate() {
                        let want = want + f64::from(bias[i % n]);
                        let error = (f64::from(*got) - want).abs();
                        assert!(error < 2e-5 * k as f64 / 8.0, "{isa} {format:?} {m}x{n}x{k}: {got} {want}");
                    }
                }
            }
        }
    }
}

#[test]
fn all_instruction_sets_agree_to_the_bit() {
    let extremes = [0.0, -0.0, 1e-40, -1e-42, 1e30, -1e30, 3.5, f32::MIN_POSITIVE];
    for format in FORMATS {
        let (n, k, m) = (45, 72, 9);
        let mut values = noise(7, n * k);
        values.iter_mut().step_by(5).zip(extremes.iter().cycle()).for_each(|(v, e)| *v = *e);
        let w = pack(format, n, k, &values);
        let x = noise(8, m * k);
        let all: Vec<Vec<u32>> = Isa::available()
            .into_iter()
            .map(|isa| {
                let mut out = vec![0.0; m * n];
                Kernels::with_isa(1, isa).linear(&w, &x, m, None, &mut out);
                out.iter().map(|v| v.to_bits()).collect()
            })
            .collect();
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "{format:?}");
    }
}

#[test]
fn a_row_is_the_same_bits_alone_and_in_a_batch() {
    let kernels = Kernels::new(2);
    for format in FORMATS {
        let (n, k, m) = (70, 96, 23);
        let w = pack(format, n, k, &noise(4, n * k));
        let x = noise(5, m * k);
        let mut batch = vec![0.0; m * n];
        kernels.linear(&w, &x, m, None, &mut batch);
        for i in 0..m {
            let mut alone = vec![0.0; n];
            kernels.linear(&w, &x[i * k..(i + 1) * k], 1, None, &mut alone);
            assert_eq!(alone, batch[i * n..(i + 1) * n], "{format:?} row {i}");
        }
    }
}

#[test]
fn quantization_errors_are_within_their_bounds() {
    let (n, k) = (64, 256);
    let values = noise(9, n * k);
    for (format, bound) in [(Format::Bf16, 0.004), (Format::Q8, 0.008), (Format::Q4 { group: 32 }, 0.16)] {
        let w = pack(format, n, k, &values);
        let mut row = vec![0.0; k];
        for r in 0..n {
            w.dequantize_row(r, &mut row);
            for (got, want) in row.iter().zip(&values[r * k..]) {
                assert!((got - want).abs() <= bound, "{format:?}: {got} for {want}");
            }
        }
    }
}

fn experts(count: usize, hidden: usize, inter: usize, format: Format) -> Vec<Option<Arc<ExpertWeights>>> {
    (0..count as u64)
        .map(|e| {
            Some(Arc::new(ExpertWeights {
                gate: pack(format, inter, hidden, &noise(100 + e, inter * hidden)),
                up: pack(format, inter, hidden, &noise(200 + e, inter * hidden)),
                down: pack(format, hidden, inter, &noise(300 + e, inter * hidden)),
                gate_bias: None,
                up_bias: Some(noise(400 + e, inter)),
                down_bias: Some(noise(500 + e, hidden)),
            }))
        })
        .collect()
}

#[test]
fn experts_sum_in_routing_order_and_do_not_see_the_batch() {
    let (hidden, inter, tokens, k) = (40, 24, 19, 3);
    let kernels = Kernels::new(2);
    for activation in [Activation::Silu, Activation::ClampedSwiGlu { alpha: 1.702, limit: 0.7 }] {
        let list = experts(8, hidden, inter, Format::Q4 { group: 32 });
        let x = noise(11, tokens * hidden);
        let offsets: Vec<u32> = (0..=tokens as u32).map(|t| t * k).collect();
        let ids: Vec<u32> = (0..tokens as u32 * k).map(|i| (i / k * 5 + i % k * 3) % 8).collect();
        let weights = noise(12, ids.len());
        let mut batch = vec![0.0; tokens * hidden];
        kernels.moe(&list, activation, &x, hidden, &offsets, &ids, &weights, &mut batch).expect("all are held");
        for t in 0..tokens {
            let x = &x[t * hidden..(t + 1) * hidden];
            let choices = t * k as usize..(t + 1) * k as usize;
            let mut alone = vec![0.0; hidden];
            let (ids, weights) = (&ids[choices.clone()], &weights[choices]);
            kernels.moe(&list, activation, x, hidden, &[0, k], ids, weights, &mut alone).expect("all are held");
            assert_eq!(alone, batch[t * hidden..(t + 1) * hidden], "token {t}");
            let mut sum = vec![0.0; hidden];
            for (id, weight) in ids.iter().zip(weights) {
                let expert = list[*id as usize].as_ref().expect("all are held");
                let mut out = vec![0.0; hidden];
                kernels.gated_ffn(expert, activation, x, 1, &mut out);
                sum.iter_mut().zip(&out).for_each(|(s, o)| *s += weight * o);
            }
            assert_eq!(sum, alone, "token {t}");
        }
    }
    let mut out = vec![0.0; hidden];
    let missing = kernels.moe(&[None], Activation::Silu, &noise(1, hidden), hidden, &[0, 1], &[0], &[1.0], &mut out);
    assert_eq!(missing, Err(Error::Expert { expert: 0 }));
}

/// Attention of one query over all keys at once, in f64.
fn attention_f64(
    keys: &[Vec<f32>],
    values: &[Vec<f32>],
    q: &[f32],
    scale: f32,
    sink: Option<f32>,
    slope: f32,
) -> Vec<f64> {
    let last = keys.len() as f64 - 1.0;
    let scores: Vec<f64> = keys
        .iter()
        .enumerate()
        .map(|(i, key)| {
            let dot: f64 = key.iter().zip(q).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            dot * f64::from(scale) + f64::from(slope) * (i as f64 - last)
        })
        .collect();
    let total: f64 = scores.iter().map(|s| s.exp()).sum::<f64>() + sink.map_or(0.0, |s| f64::from(s).exp());
    let mut out = vec![0.0; values[0].len()];
    for (score, value) in scores.iter().zip(values) {
        out.iter_mut().zip(value).for_each(|(o, v)| *o += score.exp() / total * f64::from(*v));
    }
    out
}

#[test]
fn attention_equals_the_definition_in_every_variant_and_chunking() {
    let (heads, kv_heads, len) = (6, 3, 150usize);
    for (k_dim, v_dim, v_in_k) in [(24, 24, false), (40, 20, false), (48, 32, true)] {
        for format in [KvFormat::F32, KvFormat::Bf16, KvFormat::Int8] {
            let kv_heads = if v_in_k { 1 } else { kv_heads };
            let mut kv = KvLayer::new(KvShape { kv_heads, k_dim, v_dim, v_in_k, format }, 5).unwrap();
            let blocks = [4, 1, 2];
            let (k, v) = (noise(21, len * kv_heads * k_dim), noise(22, len * kv_heads * v_dim));
            for t in 0..len {
                let k = &k[t * kv_heads * k_dim..][..kv_heads * k_dim];
                let v = &v[t * kv_heads * v_dim..][..kv_heads * v_dim];
                kv.write(blocks[t / 64], t % 64, k, if v_in_k { &[] } else { v });
            }
            let (sinks, alibi) = (noise(23, heads), noise(24, heads));
            for (window, sinks, alibi) in
                [(None, None, None), (Some(37), Some(&sinks[..]), None), (Some(200), None, Some(&alibi[..]))]
            {
                let call = AttentionCall { heads, scale: 0.3, window, sinks, alibi };
                let q = noise(25, len * heads * k_dim);
                let kernels = Kernels::new(2);
                let run = |start: usize, queries: usize| {
                    let mut out = vec![0.0; queries * heads * v_dim];
                    let sequence = AttentionSequence { blocks: &blocks, start, queries };
                    let q = &q[start * heads * k_dim..][..queries * heads * k_dim];
                    kernels.attention(&kv, &call, &[sequence], q, &mut out);
                    out
                };
                let whole = run(0, len);
                for (start, queries) in [(0, 1), (63, 2), (149, 1), (10, 77)] {
                    let part = run(start, queries);
                    assert_eq!(part, whole[start * heads * v_dim..][..part.len()], "{format:?} {start}+{queries}");
                }
                let tolerance = match format {
                    KvFormat::F32 => 1e-5,
                    KvFormat::Bf16 => 0.02,
                    KvFormat::Int8 => 0.03,
                };
                for position in [0usize, 1, 40, 64, 149] {
                    for head in 0..heads {
                        let kv_head = head / (heads / kv_heads);
                        let from = window.map_or(0, |w: usize| (position + 1).saturating_sub(w));
                        let row = |x: &[f32], dim: usize, t: usize| x[(t * kv_heads + kv_head) * dim..][..dim].to_vec();
                        let keys: Vec<_> = (from..=position).map(|t| row(&k, k_dim, t)).collect();
                        let values: Vec<_> = (from..=position)
                            .map(|t| if v_in_k { row(&k, k_dim, t)[..v_dim].to_vec() } else { row(&v, v_dim, t) })
                            .collect();
                        let q = &q[(position * heads + head) * k_dim..][..k_dim];
                        let (sink, slope) = (sinks.map(|s| s[head]), alibi.map_or(0.0, |a| a[head]));
                        let want = attention_f64(&keys, &values, q, 0.3, sink, slope);
                        let got = &whole[(position * heads + head) * v_dim..][..v_dim];
                        for (got, want) in got.iter().zip(want) {
                            let error = (f64::from(*got) - want).abs();
                            assert!(error < tolerance, "{format:?} {window:?} {position}/{head}: {got} {want}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_block_moves_between_layers_unchanged() {
    let shape = KvShape { kv_heads: 2, k_dim: 8, v_dim: 8, v_in_k: false, format: KvFormat::Int8 };
    let (mut a, mut b) = (KvLayer::new(shape, 2).unwrap(), KvLayer::new(shape, 2).unwrap());
    for slot in 0..64 {
        a.write(1, slot, &noise(slot as u64, 16), &noise(99 + slot as u64, 16));
    }
    let (mut bytes, mut back) = (Vec::new(), Vec::new());
    a.export(1, &mut bytes);
    b.import(0, &bytes).expect("the length is right");
    b.export(0, &mut back);
    assert_eq!(bytes, back);
    assert!(matches!(b.import(0, &bytes[1..]), Err(Error::Block { .. })));
}

#[test]
fn packed_bytes_of_a_wrong_length_are_refused() {
    let format = Format::Q4 { group: 64 };
    let len = PackedMatrix::packed_len(format, 33, 100);
    assert_eq!(len, 2 * 2 * (64 + 64 * 16));
    let storage = |len| Storage::Owned(Arc::new(AlignedBytes::from_zeroed(len)));
    assert!(PackedMatrix::from_storage(format, 33, 100, storage(len)).is_ok());
    assert!(matches!(PackedMatrix::from_storage(format, 33, 100, storage(len - 1)), Err(Error::Length { .. })));
}

#[test]
fn blocks_that_no_memory_holds_are_an_error() {
    let shape = KvShape { kv_heads: 8, k_dim: 128, v_dim: 128, v_in_k: false, format: KvFormat::F32 };
    for blocks in [usize::MAX, usize::MAX / shape.block_len(), 1 << 40] {
        let error = KvLayer::new(shape, blocks).err().unwrap().to_string();
        assert!(error.contains(&format!("{blocks} kv blocks")), "{error}");
    }
}
