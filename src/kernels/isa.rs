//! Instruction sets: what the kernels are compiled for, and what the machine has.

use std::{fmt, sync::OnceLock};

/// An instruction set that the kernels know. A value is only made where the machine has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// Plain Rust: every machine.
    Scalar,
    /// AVX2 with FMA and F16C (x86-64-v3).
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX2 with VEX-coded int8 dot products (AVX-VNNI).
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    /// AVX-512 F, BW, DQ, VL (x86-64-v4).
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX-512 with int8 dot products.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    /// ARM NEON (armv8-a).
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// NEON with int8 dot products (armv8.2-a dotprod).
    #[cfg(target_arch = "aarch64")]
    NeonDot,
    /// NEON with int8 dot products and matrix products (armv8.6-a i8mm).
    #[cfg(target_arch = "aarch64")]
    NeonI8mm,
}

impl Isa {
    /// The best instruction set of this machine. `TRANSNORMER_ISA=scalar|avx2|…` chooses a lesser one, for
    /// tests and for finding faults; a name that the machine does not have is ignored.
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| {
            let available = Self::available();
            let wanted = std::env::var("TRANSNORMER_ISA").unwrap_or_default();
            let named = available.iter().find(|isa| isa.name().eq_ignore_ascii_case(&wanted));
            *named.or(available.last()).expect("Scalar is always available")
        })
    }

    /// Every instruction set that this machine has, from the least to the best.
    pub fn available() -> Vec<Self> {
        #[allow(unused_mut)]
        let mut list = vec![Isa::Scalar];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
        {
            list.push(Isa::Avx2);
            if is_x86_feature_detected!("avxvnni") {
                list.push(Isa::AvxVnni);
            }
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                list.push(Isa::Avx512);
                if is_x86_feature_detected!("avx512vnni") {
                    list.push(Isa::Avx512Vnni);
                }
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            list.push(Isa::Neon);
            if std::arch::is_aarch64_feature_detected!("dotprod") {
                list.push(Isa::NeonDot);
                if std::arch::is_aarch64_feature_detected!("i8mm") {
                    list.push(Isa::NeonI8mm);
                }
            }
        }
        list
    }

    /// Lower-case name, as `TRANSNORMER_ISA` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => "avxvnni",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => "avx512vnni",
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => "neon",
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDot => "neondot",
            #[cfg(target_arch = "aarch64")]
            Isa::NeonI8mm => "neoni8mm",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn best_is_the_last_or_the_named_one() {
        let (best, available) = (Isa::best(), Isa::available());
        println!("instruction set: {best} of {available:?}");
        match std::env::var("TRANSNORMER_ISA") {
            Ok(wanted) => assert_eq!(best.name(), wanted),
            Err(_) => assert_eq!(Some(&best), available.last()),
        }
    }
}
