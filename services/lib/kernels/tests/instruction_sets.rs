//! Every instruction set that this machine has against the portable code, to the bit: all formats, row counts on both
//! sides of the fused kernels' limit and of the tiles', both formats of activations, and inputs that are random, extreme
//! (without overflow), denormal or no numbers. Products of bf16 numbers by `vdpbf16ps` take denormals for zeros: with bf16
//! weights and other than random numbers, and in attention over bf16 and int8 keys and values, a tolerance holds instead.
use moesaic_kernels::{
    Activation, ActivationFormat, AttentionCall, AttentionSequence, ExpertWeights, Format, Isa, Kernels, KvFormat,
    KvLayer, KvShape,
};

mod common;
use common::{FORMATS, noise, pack};

const ROWS: [usize; 13] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 23, 32, 33, 512];

/// Inputs whose products and sums stay finite.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Random,
    /// Magnitudes up to 1e30, beside small ones and zeros of both signs.
    Extreme,
    /// Below the smallest normal number, beside a few normal ones.
    Denormal,
}

const KINDS: [Kind; 3] = [Kind::Random, Kind::Extreme, Kind::Denormal];

impl Kind {
    /// Values that are the same for one seed.
    fn values(self, seed: u64, len: usize) -> Vec<f32> {
        let value = |(i, noise): (usize, f32)| match (self, i % 7) {
            (Self::Random, _) | (Self::Extreme, 2) => noise,
            (Self::Extreme, 0) => noise * 1e30,
            (Self::Extreme, 1) => noise * 1e-30,
            (Self::Extreme, 3) => -0.0,
            (Self::Extreme, 4) => 0.0,
            (Self::Extreme, 5) => noise * 1e25,
            (Self::Extreme, _) => noise * f32::MIN_POSITIVE,
            (Self::Denormal, 0) => noise,
            (Self::Denormal, 1) => f32::from_bits(1).copysign(noise),
            (Self::Denormal, _) => noise * 1e-39,
        };
        noise(seed, len).into_iter().enumerate().map(value).collect()
    }
}

/// Runs `work` with every instruction set: the portable code's results, and those of the others.
fn on_all(
    activations: ActivationFormat,
    finite: bool,
    what: &dyn Fn() -> String,
    work: &dyn Fn(&Kernels) -> Vec<f32>,
) -> (Vec<f32>, Vec<(Isa, Vec<f32>)>) {
    let kernels = |isa| Kernels::with_isa(2, isa).with_activations(activations);
    let mut all = Isa::available().into_iter().map(|isa| (isa, work(&kernels(isa))));
    let (first, reference) = all.next().expect("there is portable code");
    assert_eq!(first.to_string(), "scalar");
    assert!(!finite || reference.iter().all(|v| v.is_finite()), "{}: the inputs overflow", what());
    (reference, all.collect())
}

/// Holds the results of `work` to the portable code's with every instruction set; they need not be finite.
fn agree_with(
    activations: ActivationFormat,
    finite: bool,
    what: &dyn Fn() -> String,
    work: &dyn Fn(&Kernels) -> Vec<f32>,
) {
    agree_but_for(activations, finite, &|_| false, what, work);
}

/// The same where the results of some instruction sets are only near: by 1e-5 of the largest number, and 1e-35.
fn agree_but_for(
    activations: ActivationFormat,
    finite: bool,
    near: &dyn Fn(Isa) -> bool,
    what: &dyn Fn() -> String,
    work: &dyn Fn(&Kernels) -> Vec<f32>,
) {
    let (reference, all) = on_all(activations, finite, what, work);
    let largest = reference.iter().filter(|v| v.is_finite()).fold(0f32, |largest, v| largest.max(v.abs()));
    for (isa, results) in all {
        let tolerance = if near(isa) { 1e-5 * largest + 1e-35 } else { 0.0 };
        for (i, (got, want)) in results.iter().zip(&reference).enumerate() {
            let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
            let close = tolerance > 0.0 && (got - want).abs() <= tolerance;
            assert!(same || close, "{isa}, {activations:?}, {}, element {i}: {got} for {want}", what());
        }
    }
}

/// Whether products with such weights are of bf16 numbers.
fn is_pairs(format: Format, activations: ActivationFormat) -> bool {
    format == Format::Bf16 && activations == ActivationFormat::Int8
}

/// Whether products of bf16 numbers take denormals for zeros.
fn flushes(isa: Isa) -> bool {
    isa.to_string() == "avx512-bf16"
}

#[test]
fn linear_agrees_for_every_format_row_count_and_kind_of_input() {
    for format in FORMATS {
        for (n, k) in [(1, 1), (45, 72), (64, 130), (33, 257)] {
            // extreme weights meet ordinary rows, and the other way round: their product would overflow
            for (weights, inputs) in [
                (Kind::Random, Kind::Random),
                (Kind::Random, Kind::Extreme),
                (Kind::Extreme, Kind::Random),
                (Kind::Random, Kind::Denormal),
                (Kind::Denormal, Kind::Random),
                (Kind::Denormal, Kind::Denormal),
                (Kind::Denormal, Kind::Extreme),
            ] {
                // the formats with scales in f16 hold no weights of 1e30
                let quantized = !matches!(format, Format::F32 | Format::Bf16);
                if quantized && matches!(weights, Kind::Extreme) {
                    continue;
                }
                let w = pack(format, n, k, &weights.values(1, n * k));
                let bias = inputs.values(2, n);
                for m in ROWS {
                    let x = inputs.values(3 + m as u64, m * k);
                    let what = || format!("{format:?} {weights:?} weights, {inputs:?} {m} x {k} to {n}");
                    for activations in [ActivationFormat::Int8, ActivationFormat::F32] {
                        // f32 has one path only
                        if format == Format::F32 && activations == ActivationFormat::Int8 {
                            continue;
                        }
                        let is_random = matches!((weights, inputs), (Kind::Random, Kind::Random));
                        let near = |isa| is_pairs(format, activations) && !is_random && flushes(isa);
                        agree_but_for(activations, true, &near, &what, &|kernels| {
                            let mut out = vec![f32::NAN; m * n];
                            kernels.linear(&w, &x, m, Some(&bias), &mut out);
                            out
                        });
                    }
                }
            }
        }
    }
}

#[test]
fn rows_that_are_no_numbers_agree() {
    let (n, k) = (45, 130);
    for format in FORMATS {
        let w = pack(format, n, k, &Kind::Random.values(1, n * k));
        for m in ROWS.into_iter().filter(|m| *m < 100) {
            let mut x = Kind::Random.values(m as u64, m * k);
            for (i, value) in [f32::NAN, f32::INFINITY, -f32::NAN, f32::NEG_INFINITY].into_iter().enumerate() {
                let at = (i * 7 + 1) % m * k + i * 40;
                x[at] = value;
            }
            for activations in [ActivationFormat::Int8, ActivationFormat::F32] {
                agree_with(activations, false, &|| format!("{format:?} {m} rows"), &|kernels| {
                    let mut out = vec![0.0; m * n];
                    kernels.linear(&w, &x, m, None, &mut out);
                    out
                });
            }
        }
    }
}

#[test]
fn networks_agree_for_every_activation_row_count_and_kind_of_input() {
    let (hidden, inter) = (40, 135);
    let activations = [
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::Relu,
        Activation::ClampedSwiGlu { alpha: 1.702, limit: 7.0 },
    ];
    for format in FORMATS {
        let matrix = |seed, n, k| pack(format, n, k, &Kind::Random.values(seed, n * k));
        let network = ExpertWeights {
            gate: matrix(1, inter, hidden),
            up: matrix(2, inter, hidden),
            down: matrix(3, hidden, inter),
            gate_bias: None,
            up_bias: Some(Kind::Denormal.values(4, inter)),
            down_bias: Some(Kind::Random.values(5, hidden)),
        };
        for activation in activations {
            for kind in KINDS {
                for m in ROWS.into_iter().filter(|m| *m < 512 || activation == Activation::Silu) {
                    let mut x = kind.values(6, m * hidden);
                    // gate times up squares what comes in
                    x.iter_mut().for_each(|x| *x = x.clamp(-1e15, 1e15));
                    for activations in [ActivationFormat::Int8, ActivationFormat::F32] {
                        let what = || format!("{format:?} {activation:?} {kind:?} {m} rows");
                        let is_random = matches!(kind, Kind::Random);
                        let near = |isa| is_pairs(format, activations) && !is_random && flushes(isa);
                        agree_but_for(activations, true, &near, &what, &|kernels| {
                            let mut out = vec![f32::NAN; m * hidden];
                            kernels.gated_ffn(&network, activation, &x, m, &mut out);
                            out
                        });
                    }
                }
            }
        }
    }
}

/// One layer's cache of `len` tokens in scattered blocks.
fn cache(shape: KvShape, len: usize, blocks: &[u32], keys: Kind, values: Kind) -> KvLayer {
    let mut kv = KvLayer::new(shape, blocks.len() + 2).expect("a few blocks fit in memory");
    for t in 0..len {
        let k = keys.values(100 + t as u64, shape.kv_heads * shape.k_dim);
        let v = values.values(9_000 + t as u64, shape.kv_heads * shape.v_dim);
        kv.write(blocks[t / 64], t % 64, &k, if shape.v_in_k { &[] } else { &v });
    }
    kv
}

/// Window, sinks, ALiBi's slopes.
type Variant<'a> = (Option<usize>, Option<&'a [f32]>, Option<&'a [f32]>);

#[test]
fn attention_agrees_for_every_cache_variant_and_kind_of_input() {
    let (heads, len) = (4, 150);
    let blocks = [3, 0, 4];
    let sinks = Kind::Random.values(7, heads);
    let huge_sinks = vec![1e30; heads];
    let alibi = [0.5, 0.25, 1e-3, 1e-40];
    let variants: [Variant<'_>; 6] = [
        (None, None, None),
        (Some(1), None, None),
        (Some(37), Some(&sinks), None),
        (None, Some(&huge_sinks), None),
        (None, None, Some(&alibi)),
        (Some(64), Some(&sinks), Some(&alibi)),
    ];
    for format in [KvFormat::F32, KvFormat::Bf16, KvFormat::Int8] {
        for (kv_heads, k_dim, v_dim, v_in_k) in [(2, 24, 24, false), (4, 9, 5, false), (1, 33, 17, true)] {
            for kind in KINDS {
                let kv = cache(KvShape { kv_heads, k_dim, v_dim, v_in_k, format }, len, &blocks, kind, kind);
                // keys of 1e30 against queries of 1e30 would overflow
                let queries = if matches!(kind, Kind::Extreme) { Kind::Random } else { kind };
                for (window, sinks, alibi) in variants {
                    let call = AttentionCall { heads, scale: 0.3, window, sinks, alibi };
                    for (start, queries_count) in [(0, 1), (63, 2), (149, 1), (0, 150), (100, 17)] {
                        let q = queries.values(8, queries_count * heads * k_dim);
                        let what = || {
                            format!(
                                "{format:?} {kv_heads}x{k_dim}/{v_dim} {kind:?} window {window:?} sinks {} alibi {} \
                                 {start}+{queries_count}",
                                sinks.is_some(),
                                alibi.is_some()
                            )
                        };
                        let near = |isa| format != KvFormat::F32 && flushes(isa);
                        agree_but_for(ActivationFormat::default(), true, &near, &what, &|kernels| {
                            let mut out = vec![f32::NAN; queries_count * heads * v_dim];
                            let sequence = AttentionSequence { blocks: &blocks, start, queries: queries_count };
                            kernels.attention(&kv, &call, &[sequence], &q, &mut out);
                            out
                        });
                    }
                }
            }
        }
    }
}

#[test]
fn attention_averages_the_values_whatever_their_size() {
    // one key everywhere: every weight is the same, and the output is the values' mean
    let shape = |format| KvShape { kv_heads: 1, k_dim: 4, v_dim: 3, v_in_k: false, format };
    for (size, format, tolerance) in [
        (1e30, KvFormat::F32, 1e-6),
        (1e30, KvFormat::Bf16, 4e-3),
        (1e30, KvFormat::Int8, 8e-3),
        (1e-40, KvFormat::F32, 1e-4),
        (1e-37, KvFormat::Bf16, 1e-2),
        // products below 1.2e-38 may be taken for zeros
        (1e-33, KvFormat::Bf16, 4e-3),
        (1e-32, KvFormat::Int8, 8e-3),
    ] {
        let mut kv = KvLayer::new(shape(format), 2).expect("two blocks fit in memory");
        let len = 100;
        let value = |t: usize, d: usize| size * (1.0 + ((t * 7 + d * 3) % 10) as f32 / 10.0);
        for t in 0..len {
            let v: Vec<f32> = (0..3).map(|d| value(t, d)).collect();
            kv.write((t / 64) as u32, t % 64, &[0.5; 4], &v);
        }
        for isa in Isa::available() {
            let mut out = [f32::NAN; 3];
            let call = AttentionCall { heads: 1, scale: 1.0, window: None, sinks: None, alibi: None };
            let sequence = AttentionSequence { blocks: &[0, 1], start: len - 1, queries: 1 };
            Kernels::with_isa(1, isa).attention(&kv, &call, &[sequence], &[1.0; 4], &mut out);
            for (d, got) in out.iter().enumerate() {
                let want = (0..len).map(|t| f64::from(value(t, d))).sum::<f64>() / len as f64;
                let error = (f64::from(*got) - want).abs() / f64::from(size);
                assert!(error <= tolerance, "{isa} {format:?} {size}: {got} for {want}");
            }
        }
    }
}
