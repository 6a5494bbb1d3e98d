//! Formats of weights and of cached keys and values.
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// How a weight matrix is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum WeightFormat {
    /// 32-bit floats.
    F32,
    /// bfloat16.
    #[default]
    Bf16,
    /// int8, groups of 32 along the input dimension, f16 scales.
    Q8,
    /// 4-bit, groups along the input dimension, f16 scales.
    Q4 {
        /// Values that share a scale: 32, 64 or 128.
        group: u16,
    },
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::F32 => f.write_str("f32"),
            Self::Bf16 => f.write_str("bf16"),
            Self::Q8 => f.write_str("q8"),
            Self::Q4 { group: 32 } => f.write_str("q4"),
            Self::Q4 { group } => write!(f, "q4-g{group}"),
        }
    }
}

impl FromStr for WeightFormat {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "q8" => Ok(Self::Q8),
            "q4" | "q4-g32" => Ok(Self::Q4 { group: 32 }),
            "q4-g64" => Ok(Self::Q4 { group: 64 }),
            "q4-g128" => Ok(Self::Q4 { group: 128 }),
            _ => Err(format!("weight format '{text}' is unknown; use f32, bf16, q8, q4, q4-g64 or q4-g128")),
        }
    }
}

impl TryFrom<String> for WeightFormat {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<WeightFormat> for String {
    fn from(format: WeightFormat) -> Self {
        format.to_string()
    }
}

/// How cached keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvFormat {
    /// 32-bit floats.
    F32,
    /// bfloat16.
    #[default]
    Bf16,
    /// int8 with an f32 scale per token and head.
    Int8,
}

impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        })
    }
}

impl FromStr for KvFormat {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "int8" => Ok(Self::Int8),
            _ => Err(format!("kv format '{text}' is unknown; use f32, bf16 or int8")),
        }
    }
}
