//! The tokens that are still in play, and the steps of the chain that drop some of them.

use std::cmp::Ordering;

/// How many candidates are put in order at first, when a prefix of them is expected to do.
const FIRST_CHUNK: usize = 256;

/// A token that may be drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Candidate {
    pub id: u32,
    pub logit: f32,
    /// Share of the mass of all candidates, as of the last [`normalize`].
    p: f32,
}

/// The larger logit first, of equals the lower id.
fn by_logit(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

/// Fills `candidates` with the `k` largest logits, in order; with all, in order of id, if `k` is 0.
/// Tokens of logit -∞ are left out.
pub(super) fn top_k(candidates: &mut Vec<Candidate>, logits: &[f32], k: usize) {
    candidates.clear();
    let new = |(id, &logit): (u32, &f32)| Candidate { id, logit, p: 0.0 };
    if k == 0 || k >= logits.len() {
        candidates.extend((0..).zip(logits).map(new).filter(|c| c.logit > f32::NEG_INFINITY));
        return;
    }
    // Nearly all logits fall to the comparison with the floor; the others wait in twice the room they need, so
    // that the selection runs rarely.
    let room = (2 * k).max(FIRST_CHUNK);
    let mut floor = f32::NEG_INFINITY;
    for candidate in (0..).zip(logits).map(new) {
        if candidate.logit > floor {
            candidates.push(candidate);
            if candidates.len() == room {
                floor = candidates.select_nth_unstable_by(k - 1, by_logit).1.logit;
                candidates.truncate(k);
            }
        }
    }
    if candidates.len() > k {
        candidates.select_nth_unstable_by(k - 1, by_logit);
        candidates.truncate(k);
    }
    candidates.sort_unstable_by(by_logit);
}

/// Keeps the likeliest tokens that together have at least the share `mass`.
pub(super) fn top_p(candidates: &mut Vec<Candidate>, mass: f32) {
    normalize(candidates);
    keep_mass(candidates, mass, by_logit);
}

/// Keeps the tokens whose surprise is nearest to the expected one (Meister et al., "Locally Typical Sampling"),
/// until they have at least the share `mass`.
pub(super) fn typical(candidates: &mut Vec<Candidate>, mass: f32) {
    normalize(candidates);
    let entropy: f32 = candidates.iter().filter(|c| c.p > 0.0).map(|c| -c.p * c.p.ln()).sum();
    let distance = |c: &Candidate| (-c.p.ln() - entropy).abs();
    keep_mass(candidates, mass, |a, b| distance(a).total_cmp(&distance(b)).then(by_logit(a, b)));
}

/// Keeps the tokens that are at least `share` times as likely as the likeliest.
pub(super) fn min_p(candidates: &mut Vec<Candidate>, share: f32) {
    let floor = max_logit(candidates) + share.ln();
    candidates.retain(|c| c.logit >= floor);
}

/// The token at `point`, 0 ≤ point < 1, of the distribution that `temperature` makes of the candidates.
/// There is at least one.
pub(super) fn pick(candidates: &[Candidate], temperature: f32, point: f64) -> u32 {
    let max = max_logit(candidates);
    let weight = |c: &Candidate| f64::from((c.logit - max) / temperature).exp();
    let mut rest = point * candidates.iter().map(weight).sum::<f64>();
    for candidate in candidates {
        rest -= weight(candidate);
        if rest < 0.0 {
            return candidate.id;
        }
    }
    // Rounding can leave a crumb behind the last.
    candidates[candidates.len() - 1].id
}

/// Keeps the first candidates in `order` that have at least the share `mass`, in that order; always one.
///
/// Usually few do, so they are put in order a growing prefix at a time.
fn keep_mass(candidates: &mut Vec<Candidate>, mass: f32, order: impl Fn(&Candidate, &Candidate) -> Ordering) {
    let (mut done, mut sum) = (0, 0.0);
    while done < candidates.len() {
        let rest = &mut candidates[done..];
        let chunk = done.max(FIRST_CHUNK).min(rest.len());
        if chunk < rest.len() {
            rest.select_nth_unstable_by(chunk - 1, &order);
        }
        rest[..chunk].sort_unstable_by(&order);
        for i in done..done + chunk {
            sum += f64::from(candidates[i].p);
            if sum >= f64::from(mass) {
                candidates.truncate(i + 1);
                return;
            }
        }
        done += chunk;
    }
}

/// Sets the shares, by softmax.
fn normalize(candidates: &mut [Candidate]) {
    let max = max_logit(candidates);
    let mut sum = 0.0;
    for candidate in candidates.iter_mut() {
        candidate.p = (candidate.logit - max).exp();
        sum += f64::from(candidate.p);
    }
    candidates.iter_mut().for_each(|c| c.p = (f64::from(c.p) / sum) as f32);
}

fn max_logit(candidates: &[Candidate]) -> f32 {
    candidates.iter().fold(f32::NEG_INFINITY, |max, c| max.max(c.logit))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits with many ties, in no order.
    fn logits(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919) % 1009) as f32 / 64.0).collect()
    }

    fn ids(candidates: &[Candidate]) -> Vec<u32> {
        candidates.iter().map(|c| c.id).collect()
    }

    fn filled(logits: &[f32], k: usize) -> Vec<Candidate> {
        let mut candidates = Vec::new();
        top_k(&mut candidates, logits, k);
        candidates
    }

    #[test]
    fn top_k_is_the_front_of_the_sorted_logits() {
        for n in [1, 5, 300, 5000] {
            let logits = logits(n);
            let mut sorted = filled(&logits, 0);
            assert_eq!(ids(&sorted), (0..n as u32).collect::<Vec<_>>());
            sorted.sort_by(by_logit);
            for k in [1, 2, 40, 255, 256, 1000, 4999].into_iter().filter(|&k| k < n) {
                assert_eq!(ids(&filled(&logits, k)), ids(&sorted[..k]), "{k} of {n}");
            }
        }
        let banned = [f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY];
        assert_eq!(ids(&filled(&banned, 0)), [1]);
        assert_eq!(ids(&filled(&banned, 2)), [1]);
    }

    #[test]
    fn top_p_keeps_the_smallest_sufficient_set() {
        // Shares 0.5, 0.25, 0.125, 0.125, so that the sums are exact.
        let logits = [0.5f32, 0.125, 0.25, 0.125].map(f32::ln);
        for (mass, kept) in [(0.0, 1), (0.4, 1), (0.6, 2), (0.8, 3), (0.9, 4), (1.0, 4)] {
            let mut candidates = filled(&logits, 0);
            top_p(&mut candidates, mass);
            assert_eq!(ids(&candidates), [0, 2, 1, 3][..kept], "{mass}");
        }
    }

    #[test]
    fn masses_beyond_the_first_chunk_equal_a_full_sort() {
        let logits = logits(5000).iter().map(|x| x / 8.0).collect::<Vec<_>>();
        let mut sorted = filled(&logits, 0);
        normalize(&mut sorted);
        sorted.sort_by(by_logit);
        let mut sum = 0.0;
        let kept = sorted.iter().take_while(|c| (sum < 0.9, sum += f64::from(c.p)).0).count();
        assert!(kept > 2 * FIRST_CHUNK);
        let mut candidates = filled(&logits, 0);
        top_p(&mut candidates, 0.9);
        assert_eq!(ids(&candidates), ids(&sorted[..kept]));
    }

    #[test]
    fn typical_drops_the_too_likely_as_well() {
        // One token of 0.4 and sixty of 0.01: the surprise expected is 3.13, that of 0.01 is 4.6, that of 0.4 0.92.
        let logits: Vec<f32> = std::iter::once(0.4f32).chain([0.01; 60]).map(f32::ln).collect();
        let mut candidates = filled(&logits, 0);
        typical(&mut candidates, 0.245);
        assert_eq!(candidates.len(), 25);
        assert!(!ids(&candidates).contains(&0));
    }

    #[test]
    fn min_p_is_relative_to_the_likeliest() {
        let logits = [0.5f32, 0.06, 0.3, 0.04, 0.1].map(f32::ln);
        let mut candidates = filled(&logits, 0);
        min_p(&mut candidates, 0.1);
        assert_eq!(ids(&candidates), [0, 1, 2, 4]);
        min_p(&mut candidates, 1.0);
        assert_eq!(ids(&candidates), [0]);
    }

    #[test]
    fn pick_divides_the_unit_interval() {
        let candidates = filled(&[0.5f32, 0.25, 0.25].map(f32::ln), 0);
        for (point, id) in [(0.0, 0), (0.49, 0), (0.51, 1), (0.74, 1), (0.76, 2), (0.999_999, 2)] {
            assert_eq!(pick(&candidates, 1.0, point), id, "{point}");
        }
        // Cold: nearly all of the interval is the likeliest token's; hot: equal parts.
        assert_eq!(pick(&candidates, 0.05, 0.999), 0);
        assert_eq!(pick(&candidates, 1e-30, 0.999_999), 0);
        assert_eq!(pick(&candidates, 1e6, 0.334), 1);
    }
}
