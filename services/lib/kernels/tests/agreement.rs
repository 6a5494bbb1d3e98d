//! Every instruction set against the packed matrix's own rows, and every row alone against the row in a batch.
use moesaic_kernels::{
    Activation, ActivationFormat, AlignedBytes, AttentionCall, AttentionSequence, Error, ExpertWeights, Format, Isa,
    Kernels, KvFormat, KvLayer, KvShape, PackedMatrix, Storage,
};
use std::sync::Arc;

mod common;
use common::{FORMATS, noise, pack};

const ACTIVATIONS: [ActivationFormat; 2] = [ActivationFormat::F32, ActivationFormat::Int8];

/// What a product takes for a row of x: each group rounded to 127 steps on both sides of zero, each value rounded to
/// bf16, or the row itself.
fn taken(format: Format, activations: ActivationFormat, x: &[f32]) -> Vec<f64> {
    match (activations, format) {
        (ActivationFormat::F32, _) | (_, Format::F32) => return x.iter().map(|x| f64::from(*x)).collect(),
        (_, Format::Bf16) => return x.iter().map(|x| half::bf16::from_f32(*x).to_f64()).collect(),
        _ => {}
    }
    let group = |x: &[f32]| {
        let largest = x.iter().fold(0f32, |m, v| m.max(v.abs()));
        let code = move |v: &f32| f64::from((v * (127.0 / largest)).round_ties_even()) * f64::from(largest / 127.0);
        x.iter().map(code).collect::<Vec<_>>()
    };
    x.chunks(format.group()).flat_map(group).collect()
}

fn product_f64(w: &PackedMatrix, activations: ActivationFormat, x: &[f32], m: usize) -> Vec<f64> {
    let mut row = vec![0.0; w.cols()];
    let mut out = vec![0.0; m * w.rows()];
    let x: Vec<_> = x.chunks(w.cols()).map(|x| taken(w.format(), activations, x)).collect();
    for n in 0..w.rows() {
        w.dequantize_row(n, &mut row);
        for i in 0..m {
            out[i * w.rows() + n] = x[i].iter().zip(&row).map(|(a, b)| a * f64::from(*b)).sum();
        }
    }
    out
}

#[test]
fn products_equal_the_dequantized_rows_on_every_instruction_set() {
    for (isa, activations) in Isa::available().into_iter().flat_map(|isa| ACTIVATIONS.map(|a| (isa, a))) {
        let kernels = Kernels::with_isa(2, isa).with_activations(activations);
        for format in FORMATS {
            for (n, k) in [(1, 8), (7, 24), (33, 40), (64, 64), (100, 130), (31, 257)] {
                for m in [1, 2, 3, 4, 5, 6, 7, 8, 9, 23, 33] {
                    let w = pack(format, n, k, &noise(1, n * k));
                    let (x, bias) = (noise(2, m * k), noise(3, n));
                    let mut out = vec![f32::NAN; m * n];
                    kernels.linear(&w, &x, m, Some(&bias), &mut out);
                    let want = product_f64(&w, activations, &x, m);
                    for (i, (got, want)) in out.iter().zip(&want).enumerate() {
                        let want = want + f64::from(bias[i % n]);
                        let error = (f64::from(*got) - want).abs();
                        let bound = 2e-5 * k as f64 / 8.0;
                        assert!(error < bound, "{isa} {format:?} {activations:?} {m}x{n}x{k}: {got} {want}");
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
    for activations in ACTIVATIONS {
        let kernels = Kernels::new(2).with_activations(activations);
        for format in FORMATS {
            let (n, k, m) = (70, 200, 23);
            let w = pack(format, n, k, &noise(4, n * k));
            let x = noise(5, m * k);
            let mut batch = vec![0.0; m * n];
            kernels.linear(&w, &x, m, None, &mut batch);
            for i in 0..m {
                let mut alone = vec![0.0; n];
                kernels.linear(&w, &x[i * k..(i + 1) * k], 1, None, &mut alone);
                assert_eq!(alone, batch[i * n..(i + 1) * n], "{format:?} {activations:?} row {i}");
            }
            for rows in 2..m {
                let mut some = vec![0.0; rows * n];
                kernels.linear(&w, &x[..rows * k], rows, None, &mut some);
                assert_eq!(some, batch[..rows * n], "{format:?} {activations:?} {rows} rows");
            }
        }
    }
}

#[test]
fn a_row_that_is_no_number_harms_no_other() {
    let (n, k, m) = (40, 130, 9);
    for (isa, activations) in Isa::available().into_iter().flat_map(|isa| ACTIVATIONS.map(|a| (isa, a))) {
        let kernels = Kernels::with_isa(2, isa).with_activations(activations);
        for format in FORMATS {
            let w = pack(format, n, k, &noise(4, n * k));
            let x = noise(5, m * k);
            let run = |x: &[f32]| {
                let mut out = vec![0.0; m * n];
                kernels.linear(&w, x, m, None, &mut out);
                out
            };
            let clean = run(&x);
            for (row, value) in [(0, f32::NAN), (4, -f32::NAN), (8, f32::INFINITY), (3, f32::NEG_INFINITY)] {
                let mut x = x.clone();
                x[row * k + 77] = value;
                for (i, (got, clean)) in run(&x).iter().zip(&clean).enumerate() {
                    if i / n == row {
                        assert!(!got.is_finite(), "{isa} {format:?} {activations:?} {value} {i}: {got}");
                    } else {
                        assert_eq!(got.to_bits(), clean.to_bits(), "{isa} {format:?} {activations:?} {value} {i}");
                    }
                }
            }
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

/// Experts whose gate, up and down have these formats, the next expert's the next ones.
fn experts(count: usize, hidden: usize, inter: usize, formats: &[[Format; 3]]) -> Vec<Option<Arc<ExpertWeights>>> {
    (0..count as u64)
        .map(|e| {
            let [gate, up, down] = formats[e as usize % formats.len()];
            Some(Arc::new(ExpertWeights {
                gate: pack(gate, inter, hidden, &noise(100 + e, inter * hidden)),
                up: pack(up, inter, hidden, &noise(200 + e, inter * hidden)),
                down: pack(down, hidden, inter, &noise(300 + e, inter * hidden)),
                gate_bias: (e % 2 == 1).then(|| noise(350 + e, inter)),
                up_bias: Some(noise(400 + e, inter)),
                down_bias: Some(noise(500 + e, hidden)),
            }))
        })
        .collect()
}

const Q4: Format = Format::Q4 { group: 32 };
const Q4_64: Format = Format::Q4 { group: 64 };
const Q4_128: Format = Format::Q4 { group: 128 };

#[test]
fn experts_sum_in_their_order_and_do_not_see_the_batch() {
    let (tokens, k) = (37, 3);
    let clamped = Activation::ClampedSwiGlu { alpha: 1.702, limit: 0.7 };
    let mixed = [[Q4, Q4, Q4], [Q4_128, Q4, Q4_64], [Format::Bf16, Format::Q8, Q4_128], [Q4_64, Q4_64, Format::F32]];
    let (small, odd, wide) = ((40, 24), (72, 130), (256, 384));
    for (threads, activations, (hidden, inter), activation, formats) in [
        (2, ActivationFormat::Int8, small, Activation::Silu, &mixed[..1]),
        (2, ActivationFormat::F32, small, clamped, &mixed[..1]),
        (3, ActivationFormat::Int8, odd, clamped, &mixed[..]),
        (3, ActivationFormat::F32, odd, Activation::Silu, &mixed[..]),
        (1, ActivationFormat::Int8, odd, Activation::Gelu, &mixed[..]),
        (2, ActivationFormat::Int8, wide, Activation::Silu, &mixed[..]),
        (2, ActivationFormat::Int8, wide, Activation::Silu, &[[Q4_128; 3]]),
        (2, ActivationFormat::Int8, wide, Activation::Silu, &[[Format::Q8; 3]]),
    ] {
        let kernels = Kernels::new(threads).with_activations(activations);
        let list = experts(8, hidden, inter, formats);
        let x = noise(11, tokens * hidden);
        let offsets: Vec<u32> = (0..=tokens as u32).map(|t| t * k).collect();
        let ids: Vec<u32> = (0..tokens as u32 * k).map(|i| (i / k * 5 + i % k * 3) % 8).collect();
        let weights = noise(12, ids.len());
        let mut batch = vec![f32::NAN; tokens * hidden];
        kernels.moe(&list, activation, &x, hidden, &offsets, &ids, &weights, &mut batch).expect("all are held");
        for t in 0..tokens {
            let x = &x[t * hidden..(t + 1) * hidden];
            let choices = t * k as usize..(t + 1) * k as usize;
            let mut alone = vec![0.0; hidden];
            let (ids, weights) = (&ids[choices.clone()], &weights[choices]);
            kernels.moe(&list, activation, x, hidden, &[0, k], ids, weights, &mut alone).expect("all are held");
            assert_eq!(alone, batch[t * hidden..(t + 1) * hidden], "token {t}");
            let mut sum = vec![0.0; hidden];
            let mut order: Vec<_> = ids.iter().zip(weights).collect();
            order.sort_by_key(|(id, _)| **id);
            for (id, weight) in order {
                let expert = list[*id as usize].as_ref().expect("all are held");
                let mut out = vec![0.0; hidden];
                kernels.gated_ffn(expert, activation, x, 1, &mut out);
                sum.iter_mut().zip(&out).for_each(|(s, o)| *s += weight * o);
            }
            assert_eq!(sum, alone, "token {t}");
        }
    }
}

#[test]
fn a_network_equals_its_definition() {
    let (hidden, inter, m) = (72, 130, 11);
    for activations in ACTIVATIONS {
        for formats in [[Q4, Q4, Q4], [Q4_128, Q4, Q4_64], [Format::Bf16, Format::Q8, Q4_128], [Format::F32; 3]] {
            let expert = experts(2, hidden, inter, &[formats]).pop().flatten().expect("it was made");
            let x = noise(13, m * hidden);
            let mut out = vec![f32::NAN; m * hidden];
            let kernels = Kernels::new(2).with_activations(activations);
            kernels.gated_ffn(&expert, Activation::Silu, &x, m, &mut out);
            let with = |w: &PackedMatrix, x: &[f32], bias: &Option<Vec<f32>>| {
                let bias = bias.as_ref().expect("the second expert has all");
                let product = product_f64(w, activations, x, m).into_iter().enumerate();
                product.map(|(i, v)| (v + f64::from(bias[i % w.rows()])) as f32).collect::<Vec<_>>()
            };
            let (gate, up) = (with(&expert.gate, &x, &expert.gate_bias), with(&expert.up, &x, &expert.up_bias));
            let inner: Vec<f32> = gate.iter().zip(&up).map(|(g, u)| Activation::Silu.gated(*g, *u)).collect();
            let want = with(&expert.down, &inner, &expert.down_bias);
            // a value close to a step's edge may be rounded to either side
            let step = if activations == ActivationFormat::Int8 { 0.05 } else { 1e-3 };
            for (got, want) in out.iter().zip(want) {
                assert!((got - want).abs() < step, "{activations:?} {formats:?}: {got} for {want}");
            }
        }
    }
}

#[test]
fn tokens_without_experts_get_zeros_and_missing_experts_are_an_error() {
    let hidden = 40;
    let kernels = Kernels::new(2);
    let list = experts(3, hidden, 24, &[[Q4; 3]]);
    let x = noise(1, 2 * hidden);
    let mut out = vec![f32::NAN; 2 * hidden];
    kernels.moe(&list, Activation::Silu, &x, hidden, &[0, 0, 1], &[2], &[1.0], &mut out).expect("2 is held");
    assert!(out[..hidden].iter().all(|v| *v == 0.0) && out[hidden..].iter().any(|v| *v != 0.0));
    kernels.moe(&list, Activation::Silu, &x, hidden, &[0, 0, 0], &[], &[], &mut out).expect("none is asked for");
    assert!(out.iter().all(|v| *v == 0.0));
    for (list, expert) in [(&[None][..], 0), (&list[..], 3), (&list[..], u32::MAX)] {
        let mut out = vec![0.0; hidden];
        let x = &x[..hidden];
        let result = kernels.moe(list, Activation::Silu, x, hidden, &[0, 1], &[expert], &[1.0], &mut out);
        assert_eq!(result, Err(Error::Expert { expert }));
    }
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
