//! A small random generator whose whole state is four words.

use std::hash::{BuildHasher, Hasher, RandomState};

/// xoshiro256++ (Blackman and Vigna, 2019), seeded by splitmix64. Equal seeds give equal numbers everywhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rng {
    state: [u64; 4],
}

impl Rng {
    /// The generator of `seed`.
    pub fn new(seed: u64) -> Self {
        let mut x = seed;
        Self { state: std::array::from_fn(|_| splitmix64(&mut x)) }
    }

    /// The generator that was in this state, unless it is the all-zero state, which is none's.
    pub fn from_state(state: [u64; 4]) -> Option<Self> {
        (state != [0; 4]).then_some(Self { state })
    }

    /// The state, to go on from later.
    pub fn state(&self) -> [u64; 4] {
        self.state
    }

    /// The next number, uniform in 0 ≤ x < 1, with 53 random bits.
    pub fn next_f64(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    fn next_u64(&mut self) -> u64 {
        let s = &mut self.state;
        let result = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }
}

/// A seed that differs from call to call, by the randomness that the standard library keys its maps with.
pub(super) fn random_seed() -> u64 {
    RandomState::new().build_hasher().finish()
}

fn splitmix64(x: &mut u64) -> u64 {
    *x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (*x ^ (*x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_the_published_sequence() {
        // First outputs of xoshiro256++ from the state 1, 2, 3, 4.
        let mut rng = Rng::from_state([1, 2, 3, 4]).unwrap();
        assert_eq!([(); 3].map(|()| rng.next_u64()), [41943041, 58720359, 3588806011781223]);
        assert_eq!(Rng::from_state([0; 4]), None);
    }

    #[test]
    fn numbers_are_uniform_and_a_state_goes_on() {
        let mut rng = Rng::new(7);
        let numbers: Vec<f64> = (0..10_000).map(|_| rng.next_f64()).collect();
        assert!(numbers.iter().all(|x| (0.0..1.0).contains(x)));
        let mean = numbers.iter().sum::<f64>() / 10_000.0;
        // Six standard deviations.
        assert!((mean - 0.5).abs() < 6.0 * 0.00289, "{mean}");
        let mut again = Rng::from_state(rng.state()).unwrap();
        assert_eq!(rng.next_u64(), again.next_u64());
        assert_ne!(random_seed(), random_seed());
    }
}
