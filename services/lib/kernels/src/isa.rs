//! Instruction sets, detected once and chosen at run time.
use std::fmt;
use std::sync::OnceLock;

/// A token for an instruction set that this CPU has: [`Self::available`] and [`Self::best`] are the only ways to get
/// one, so holding it is the proof that its instructions may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Isa(Kind);

/// The instruction sets that the kernels are compiled for, the simplest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Portable code.
    Scalar,
    /// AVX2 with FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, VL, DQ.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// The same with VNNI: products of 8-bit integers.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    /// The same with VNNI and BF16: products of bfloat16 too.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
}

impl Isa {
    /// Those that this machine has, the simplest first.
    pub fn available() -> Vec<Self> {
        #[allow(unused_mut, reason = "other architectures have one only")]
        let mut list = vec![Self(Kind::Scalar)];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            if avx2 && is_x86_feature_detected!("f16c") {
                list.push(Self(Kind::Avx2));
                let avx512 = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
                if avx512 && is_x86_feature_detected!("avx512vl") && is_x86_feature_detected!("avx512dq") {
                    list.push(Self(Kind::Avx512));
                    if is_x86_feature_detected!("avx512vnni") {
                        list.push(Self(Kind::Avx512Vnni));
                        if is_x86_feature_detected!("avx512bf16") {
                            list.push(Self(Kind::Avx512Bf16));
                        }
                    }
                }
            }
        }
        list
    }

    /// The best that this machine has.
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().last().copied().unwrap_or(Self(Kind::Scalar)))
    }

    /// Which it is.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "there is one only"))]
    pub(crate) fn kind(self) -> Kind {
        self.0
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Kind::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Vnni => "avx512-vnni",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Bf16 => "avx512-bf16",
        })
    }
}

/// Compiles a body for each instruction set and calls the chosen one.
///
/// The body is an `#[inline(always)]` function, so that it takes on the features of the function around it.
macro_rules! for_each_isa {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) => $body:ident) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments, reason = "a kernel's inner call")]
        $vis fn $name(isa: $crate::isa::Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments, reason = "a kernel's inner call")]
                fn avx2($($arg: $ty),*) { $body($($arg),*) }
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments, reason = "a kernel's inner call")]
                fn avx512($($arg: $ty),*) { $body($($arg),*) }
                match isa.kind() {
                    $crate::isa::Kind::Scalar => {}
                    // SAFETY: a token of this kind is made only where the CPU has AVX2, FMA and F16C.
                    $crate::isa::Kind::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::isa::Kind::Avx512
                    | $crate::isa::Kind::Avx512Vnni
                    // SAFETY: tokens of these kinds are made only where the CPU has these parts of AVX-512.
                    | $crate::isa::Kind::Avx512Bf16 => return unsafe { avx512($($arg),*) },
                }
            }
            let _ = isa;
            $body($($arg),*)
        }
    };
}
pub(crate) use for_each_isa;
