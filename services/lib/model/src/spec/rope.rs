//! Rotary position embedding and its scalings.
//!
//! Two of Hugging Face's scalings depend on how long a sequence has become. Keys that are cached, shared between requests
//! and written in chunks cannot, so a model has one rotation: `dynamic` is served up to `max_position_embeddings`, where
//! it leaves the frequencies as they are; `longrope` has the factors for long sequences if `max_position_embeddings` is
//! above the original length, also for sequences that are still short, and the factors for short ones if it is not.
use super::config::Config;
use crate::Result;
use std::f64::consts::PI;

/// How frequencies change for contexts longer than the training's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// Positions divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Dynamic NTK: as trained up to the length of training, which is the longest context.
    Dynamic {
        /// Would stretch longer contexts.
        factor: f64,
    },
    /// LongRoPE (arXiv 2402.13753): a divisor for each frequency ([`Rope::divisors`]).
    Long {
        /// The longest context over the original one.
        factor: f64,
        /// Multiplies cosines and sines.
        attention_factor: f64,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, a ramp between.
    Llama3 {
        /// Divides low frequencies.
        factor: f64,
        /// Wavelengths above `original_context / low` are low frequencies.
        low: f64,
        /// Wavelengths below `original_context / high` are high frequencies.
        high: f64,
        /// The context that the model was trained with.
        original_context: f64,
    },
    /// YaRN (arXiv 2309.00071): a ramp over dimensions between interpolation and extrapolation.
    Yarn {
        /// Divides interpolated frequencies.
        factor: f64,
        /// Rotations above which a dimension is extrapolated.
        beta_fast: f64,
        /// Rotations below which a dimension is interpolated.
        beta_slow: f64,
        /// The context that the model was trained with.
        original_context: f64,
        /// Whether the ramp's bounds are rounded to whole dimensions.
        truncate: bool,
        /// Multiplies cosines and sines.
        attention_factor: f64,
    },
}

/// Rotary embedding of the first or last `dims` dimensions of a head.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Dimensions that turn; even.
    pub dims: usize,
    /// The base of the frequencies.
    pub theta: f64,
    /// Pairs are neighbours (2i, 2i+1); else (i, i + dims/2).
    pub interleaved: bool,
    /// Scaling.
    pub scaling: RopeScaling,
    /// Divisors of the frequencies, `dims / 2` of them: LongRoPE's, or those that a GGUF file may carry
    /// (`rope_freqs.weight`).
    pub divisors: Option<Vec<f32>>,
}

/// YaRN's temperature: `0.1 m ln(factor) + 1`.
pub fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

impl Rope {
    /// The angle per position of each pair, `dims / 2` of them.
    pub fn frequencies(&self) -> Vec<f32> {
        let half = self.dims / 2;
        let base = |pair: usize| self.theta.powf(-(2.0 * pair as f64) / self.dims as f64);
        let mut frequencies: Vec<f64> = (0..half).map(base).collect();
        match self.scaling {
            RopeScaling::None | RopeScaling::Dynamic { .. } | RopeScaling::Long { .. } => {}
            RopeScaling::Linear { factor } => frequencies.iter_mut().for_each(|f| *f /= factor),
            RopeScaling::Llama3 { factor, low, high, original_context } => {
                for f in &mut frequencies {
                    let wavelength = 2.0 * PI / *f;
                    if wavelength > original_context / low {
                        *f /= factor;
                    } else if wavelength >= original_context / high {
                        let smooth = (original_context / wavelength - low) / (high - low);
                        *f = (1.0 - smooth) * *f / factor + smooth * *f;
                    }
                }
            }
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original_context, truncate, .. } => {
                let dims = self.dims as f64;
                let dimension =
                    |rotations: f64| dims * (original_context / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
                let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dims - 1.0));
                if low == high {
                    high += 0.001;
                }
                for (pair, f) in frequencies.iter_mut().enumerate() {
                    let interpolated = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    *f = *f / factor * interpolated + *f * (1.0 - interpolated);
                }
            }
        }
        if let Some(divisors) = &self.divisors {
            frequencies.iter_mut().zip(divisors).for_each(|(f, &d)| *f /= f64::from(d));
        }
        frequencies.into_iter().map(|f| f as f32).collect()
    }

    /// What cosines and sines are multiplied by.
    pub fn attention_factor(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::Long { attention_factor, .. } => {
                attention_factor as f32
            }
            _ => 1.0,
        }
    }

    /// Fills `cos` and `sin` with `[positions, dims / 2]` each, of [`Self::frequencies`], which a caller computes once.
    pub fn table(&self, frequencies: &[f32], positions: &[u32], cos: &mut Vec<f32>, sin: &mut Vec<f32>) {
        let factor = self.attention_factor();
        cos.clear();
        sin.clear();
        for &position in positions {
            for &frequency in frequencies {
                // The reference rounds the angle to f32; so do we.
                let (s, c) = f64::from(position as f32 * frequency).sin_cos();
                cos.push(c as f32 * factor);
                sin.push(s as f32 * factor);
            }
        }
    }
}

/// What a configuration says of rotary embedding, in the new form (`rope_parameters`) or the older one
/// (`rope_theta` beside `rope_scaling`).
pub(super) struct RopeConfig<'a> {
    pub(super) theta: f64,
    pub(super) partial: f64,
    pub(super) scaling: RopeScaling,
    /// LongRoPE's divisors, and the key that has them.
    divisors: Option<(&'static str, Vec<f32>)>,
    parameters: Option<Config<'a>>,
}

impl<'a> RopeConfig<'a> {
    /// `partial`: whether the family can turn a part of each head only.
    pub(super) fn read(config: &Config<'a>, max_context: usize, partial: bool) -> Result<Self> {
        let parameters = match config.object("rope_scaling")? {
            Some(parameters) => Some(parameters),
            None => config.object("rope_parameters")?,
        };
        if let Some(parameters) = &parameters
            && let Some(layers) = ["full_attention", "sliding_attention"].iter().find(|key| parameters.has(key))
        {
            return Err(parameters.error(layers, "rotation by kind of layer is not supported".into()));
        }
        let number = |key: &str, default: f64| -> Result<f64> {
            match parameters.as_ref().filter(|p| p.has(key)) {
                Some(parameters) => parameters.positive(key, Some(default)),
                None => config.positive(key, Some(default)),
            }
        };
        let theta = number("rope_theta", 10_000.0)?;
        let factor = number("partial_rotary_factor", 1.0)?;
        if !partial && factor != 1.0 {
            let reason = format!("{factor} is not supported with this family; every dimension turns");
            return Err(config.error("partial_rotary_factor", reason));
        }
        let scaling = match &parameters {
            Some(parameters) => scaling(parameters, config, max_context)?,
            None => RopeScaling::None,
        };
        let divisors = match (&parameters, scaling) {
            (Some(parameters), RopeScaling::Long { .. }) => {
                let long = max_context as f64 > original_context(parameters, config, max_context)?;
                let key = if long { "long_factor" } else { "short_factor" };
                Some((key, parameters.positives(key)?))
            }
            _ => None,
        };
        Ok(Self { theta, partial: factor, scaling, divisors, parameters })
    }

    pub(super) fn rope(&self, config: &Config<'_>, head_dim: usize, interleaved: bool) -> Result<Rope> {
        let dims = (head_dim as f64 * self.partial) as usize;
        if dims == 0 || !dims.is_multiple_of(2) || dims > head_dim {
            return Err(config.error(
                "head_dim",
                format!("{dims} rotary dimensions of a head of {head_dim} are impossible; they must be even"),
            ));
        }
        if self.theta <= 1.0 {
            return Err(config.error("rope_theta", format!("{} is not above 1", self.theta)));
        }
        let divisors = match &self.divisors {
            Some((key, divisors)) if divisors.len() != dims / 2 => {
                let reason = format!("has {} numbers for {} pairs of dimensions", divisors.len(), dims / 2);
                return Err(config.error(key, reason));
            }
            divisors => divisors.as_ref().map(|(_, divisors)| divisors.clone()),
        };
        Ok(Rope { dims, theta: self.theta, interleaved, scaling: self.scaling, divisors })
    }

    /// DeepSeek scales attention by the square of YaRN's temperature for `mscale_all_dim`, whatever the scaling.
    pub(super) fn mla_scale(&self) -> Result<f64> {
        let factor = match self.scaling {
            RopeScaling::None => return Ok(1.0),
            RopeScaling::Linear { factor }
            | RopeScaling::Dynamic { factor }
            | RopeScaling::Long { factor, .. }
            | RopeScaling::Llama3 { factor, .. }
            | RopeScaling::Yarn { factor, .. } => factor,
        };
        let mscale = match &self.parameters {
            Some(parameters) => parameters.number("mscale_all_dim", Some(0.0))?,
            None => 0.0,
        };
        Ok(if mscale == 0.0 { 1.0 } else { yarn_mscale(factor, mscale).powi(2) })
    }
}

/// The context that the model was trained with.
fn original_context(parameters: &Config<'_>, config: &Config<'_>, max_context: usize) -> Result<f64> {
    let key = "original_max_position_embeddings";
    // the one beside the parameters wins
    let own = parameters.positive(key, Some(max_context as f64))?;
    config.positive(key, Some(own))
}

fn scaling(parameters: &Config<'_>, config: &Config<'_>, max_context: usize) -> Result<RopeScaling> {
    let kind = match parameters.text("rope_type")? {
        Some(kind) => Some(kind),
        None => parameters.text("type")?,
    };
    let original_context = || original_context(parameters, config, max_context);
    Ok(match kind.unwrap_or("default") {
        "default" | "none" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: parameters.positive("factor", None)? },
        "llama3" => {
            let scaling = RopeScaling::Llama3 {
                factor: parameters.positive("factor", None)?,
                low: parameters.positive("low_freq_factor", None)?,
                high: parameters.positive("high_freq_factor", None)?,
                original_context: original_context()?,
            };
            if matches!(scaling, RopeScaling::Llama3 { low, high, .. } if low >= high) {
                return Err(parameters.error("low_freq_factor", "must be below high_freq_factor".into()));
            }
            scaling
        }
        "yarn" => {
            let original_context = original_context()?;
            let factor = parameters.positive("factor", Some(max_context as f64 / original_context))?;
            let mscale = parameters.number("mscale", Some(0.0))?;
            let mscale_all_dim = parameters.number("mscale_all_dim", Some(0.0))?;
            let attention_factor = if parameters.has("attention_factor") {
                parameters.positive("attention_factor", None)?
            } else if mscale != 0.0 && mscale_all_dim != 0.0 {
                yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
            } else {
                yarn_mscale(factor, 1.0)
            };
            RopeScaling::Yarn {
                factor,
                beta_fast: parameters.positive("beta_fast", Some(32.0))?,
                beta_slow: parameters.positive("beta_slow", Some(1.0))?,
                original_context,
                truncate: parameters.flag("truncate", true)?,
                attention_factor,
            }
        }
        "dynamic" => RopeScaling::Dynamic { factor: parameters.positive("factor", None)? },
        // "su": its name in the first Phi-3 files
        "longrope" | "su" => {
            let original_context = original_context()?;
            let factor = parameters.positive("factor", Some(max_context as f64 / original_context))?;
            if original_context <= 1.0 {
                return Err(parameters.error("original_max_position_embeddings", "is not above 1".into()));
            }
            let usual = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original_context.ln()).sqrt() };
            let attention_factor = parameters.positive("attention_factor", Some(usual))?;
            RopeScaling::Long { factor, attention_factor }
        }
        other => {
            return Err(parameters.error(
                "rope_type",
                format!(
                    "'{other}' is not supported; supported are default, linear, dynamic, llama3, yarn and longrope"
                ),
            ));
        }
    })
}
