//! The engine's own CPU kernels, each written once over a vector type and compiled for every instruction
//! set; the best one that the machine has is picked at run time.
//!
//! | module | what |
//! |---|---|
//! | [`simd`] | vectors of f32 on scalar, AVX2, AVX-512 and NEON registers |
//! | [`isa`] | which instruction sets the machine has |
//! | [`attention`] | Lightning Attention: recurrent step and block form |
//! | [`operand`] | input rows of matrix products, as f32 and as int8 |
//! | [`matmul`] | matrix products with weights of every type |
//! | [`tile`] | f32 matrix products in register tiles |
//! | [`rows`] | norms, gates, activation functions, rotary angles on rows of f32 |

pub(crate) mod attention;
pub mod isa;
pub(crate) mod matmul;
pub(crate) mod operand;
pub(crate) mod rows;
pub(crate) mod simd;
pub(crate) mod tile;

/// Compiles a generic kernel once per instruction set and picks one by its first argument, an [`isa::Isa`].
///
/// `dispatch! { /// docs  pub(crate) fn name(arg: Type, ...) = generic; }` expects
/// `unsafe fn generic<S: Simd>(arg: Type, ...)` marked `#[inline(always)]`.
macro_rules! dispatch {
    ($(#[$doc:meta])* $vis:vis unsafe fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)? = $generic:ident;) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        $vis unsafe fn $name(isa: crate::kernels::isa::Isa, $($arg: $type),*) $(-> $ret)? {
            use crate::kernels::{isa::Isa, simd};

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments)]
            unsafe fn avx512($($arg: $type),*) $(-> $ret)? {
                // SAFETY: the caller's promise, and the features of this function.
                unsafe { $generic::<simd::Avx512>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments)]
            unsafe fn avx2($($arg: $type),*) $(-> $ret)? {
                // SAFETY: as above.
                unsafe { $generic::<simd::Avx2>($($arg),*) }
            }
            // SAFETY: the caller's promise; an Isa value exists only where the machine has its features.
            unsafe {
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512 | Isa::Avx512Vnni => avx512($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 | Isa::AvxVnni => avx2($($arg),*),
                    #[cfg(target_arch = "aarch64")]
                    Isa::Neon | Isa::NeonDot | Isa::NeonI8mm => $generic::<simd::Neon>($($arg),*),
                    _ => $generic::<simd::Scalar>($($arg),*),
                }
            }
        }
    };
}
pub(crate) use dispatch;
