//! The one ladder from what the machine has to code compiled for it.

use super::isa::Isa;
#[cfg(target_arch = "aarch64")]
use super::isa::neon::{DOT_PRODUCT, MATRICES};
use super::isa::scalar::Scalar;

/// Code written once for every rung: [`dispatch`] runs `eval` compiled for one of them.
///
/// `eval`, and all that it calls with the token, must be `#[inline(always)]`: a function that stays outside is compiled
/// without the rung's features and would be slow.
pub trait Kernel {
    type Output;
    /// Whether it has a use for products of four bytes: only such kernels are compiled for the rungs that have them (AVX-VNNI, AVX-512 VNNI,
    /// NEON with dot products or I8MM).
    const OF_BYTES: bool = false;
    /// Whether it has a use for products of pairs of bfloat16, likewise (AVX-512 BF16, NEON with BF16).
    const OF_HALVES: bool = false;
    fn eval<I: Isa>(self, isa: I) -> Self::Output;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Rung {
    Scalar,
    #[cfg(target_arch = "aarch64")]
    Neon,
    #[cfg(target_arch = "aarch64")]
    NeonDot,
    #[cfg(target_arch = "aarch64")]
    NeonBf16,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
}

/// A rung of the ladder that this machine can run. Values only come from [`IsaLevel::detect`], [`IsaLevel::available`] and
/// [`IsaLevel::named`], which is what makes [`dispatch`] safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IsaLevel(Rung);

impl IsaLevel {
    /// The rung every machine has.
    pub const SCALAR: IsaLevel = IsaLevel(Rung::Scalar);

    /// The best rung of this machine.
    pub fn detect() -> IsaLevel {
        IsaLevel::available().last().unwrap_or(IsaLevel::SCALAR)
    }

    /// All rungs of this machine, from the lowest.
    pub fn available() -> impl Iterator<Item = IsaLevel> {
        #[cfg(target_arch = "x86_64")]
        let more = [
            super::isa::x86::Avx2::<false>::new().map(|_| IsaLevel(Rung::Avx2)),
            super::isa::x86::Avx2::<true>::new().map(|_| IsaLevel(Rung::AvxVnni)),
            super::isa::x86::Avx512::<false, false>::new().map(|_| IsaLevel(Rung::Avx512)),
            super::isa::x86::Avx512::<true, false>::new().map(|_| IsaLevel(Rung::Avx512Vnni)),
            super::isa::x86::Avx512::<true, true>::new().map(|_| IsaLevel(Rung::Avx512Bf16)),
        ];
        #[cfg(target_arch = "aarch64")]
        let more = [
            super::isa::neon::Neon::<0>::new().map(|_| IsaLevel(Rung::Neon)),
            super::isa::neon::Neon::<DOT_PRODUCT>::new().map(|_| IsaLevel(Rung::NeonDot)),
            super::isa::neon::Neon::<MATRICES>::new().map(|_| IsaLevel(Rung::NeonBf16)),
        ];
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let more: [Option<IsaLevel>; 0] = [];
        std::iter::once(IsaLevel::SCALAR).chain(more.into_iter().flatten())
    }

    /// The rung with this [`name`](IsaLevel::name), if this machine has it.
    pub fn named(name: &str) -> Option<IsaLevel> {
        IsaLevel::available().find(|level| level.name() == name)
    }

    /// `scalar`, `neon`, `neondot`, `neonbf16` (with I8MM), `avx2`, `avxvnni`, `avx512`, `avx512vnni` or `avx512bf16`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Rung::Scalar => "scalar",
            #[cfg(target_arch = "aarch64")]
            Rung::Neon => "neon",
            #[cfg(target_arch = "aarch64")]
            Rung::NeonDot => "neondot",
            #[cfg(target_arch = "aarch64")]
            Rung::NeonBf16 => "neonbf16",
            #[cfg(target_arch = "x86_64")]
            Rung::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Rung::AvxVnni => "avxvnni",
            #[cfg(target_arch = "x86_64")]
            Rung::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Rung::Avx512Vnni => "avx512vnni",
            #[cfg(target_arch = "x86_64")]
            Rung::Avx512Bf16 => "avx512bf16",
        }
    }

    /// Whether [`Isa::dot_bf16`] is an instruction there.
    pub fn has_bf16(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "aarch64")]
            Rung::NeonBf16 => true,
            #[cfg(target_arch = "x86_64")]
            Rung::Avx512Bf16 => true,
            _ => false,
        }
    }
}

/// Runs a kernel on one rung.
pub fn dispatch<K: Kernel>(level: IsaLevel, kernel: K) -> K::Output {
    match level.0 {
        Rung::Scalar => Scalar.outline(kernel),
        #[cfg(target_arch = "aarch64")]
        Rung::NeonBf16 if K::OF_HALVES || K::OF_BYTES => {
            super::isa::neon::Neon::<MATRICES>::new().expect("a level is only made where it exists").outline(kernel)
        }
        #[cfg(target_arch = "aarch64")]
        Rung::NeonDot if K::OF_BYTES => {
            super::isa::neon::Neon::<DOT_PRODUCT>::new().expect("a level is only made where it exists").outline(kernel)
        }
        #[cfg(target_arch = "aarch64")]
        Rung::Neon | Rung::NeonDot | Rung::NeonBf16 => {
            super::isa::neon::Neon::<0>::new().expect("a level is only made where it exists").outline(kernel)
        }
        #[cfg(target_arch = "x86_64")]
        Rung::AvxVnni if K::OF_BYTES => {
            super::isa::x86::Avx2::<true>::new().expect("a level is only made where it exists").outline(kernel)
        }
        #[cfg(target_arch = "x86_64")]
        Rung::Avx2 | Rung::AvxVnni => {
            super::isa::x86::Avx2::<false>::new().expect("a level is only made where it exists").outline(kernel)
        }
        #[cfg(target_arch = "x86_64")]
        Rung::Avx512Bf16 if K::OF_HALVES => {
            super::isa::x86::Avx512::<false, true>::new().expect("a level is only made where it exists").outline(kernel)
        }
        #[cfg(target_arch = "x86_64")]
        Rung::Avx512Vnni | Rung::Avx512Bf16 if K::OF_BYTES => {
            super::isa::x86::Avx512::<true, false>::new().expect("a level is only made where it exists").outline(kernel)
        }
        #[cfg(target_arch = "x86_64")]
        Rung::Avx512 | Rung::Avx512Vnni | Rung::Avx512Bf16 => super::isa::x86::Avx512::<false, false>::new()
            .expect("a level is only made where it exists")
            .outline(kernel),
    }
}

/// Runs a kernel that nothing but pairs of bfloat16 is for: on a rung that multiplies them, else on the scalar one. It is compiled for no other.
pub fn dispatch_bf16<K: Kernel>(level: IsaLevel, kernel: K) -> K::Output {
    const { assert!(K::OF_HALVES) };
    match level.0 {
        #[cfg(target_arch = "aarch64")]
        Rung::NeonBf16 => {
            super::isa::neon::Neon::<MATRICES>::new().expect("a level is only made where it exists").outline(kernel)
        }
        #[cfg(target_arch = "x86_64")]
        Rung::Avx512Bf16 => {
            super::isa::x86::Avx512::<false, true>::new().expect("a level is only made where it exists").outline(kernel)
        }
        _ => Scalar.outline(kernel),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_rung_is_available_and_has_its_name() {
        let best = IsaLevel::detect();
        assert!(IsaLevel::available().any(|level| level == best));
        for level in IsaLevel::available() {
            assert_eq!(IsaLevel::named(level.name()), Some(level));
            assert!(level <= best);
        }
        assert_eq!(IsaLevel::named("mmx"), None);
    }
}
