//! What memory lets through: the weights read, and nothing computed.

use std::{
    hint::black_box,
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

/// Streams that a thread reads at once: one alone leaves the memory waiting for the next address.
const STREAMS: usize = 4;
const LINE: usize = 64;
/// Short, so that some are not disturbed by other programs.
const ROUND: Duration = Duration::from_millis(20);
const ROUNDS: usize = 15;

/// Bytes per second at which `threads` threads together read `parts` again and again; the best of a few rounds.
///
/// For parts that fit into the processor's caches it is their speed, as it is for a model that small.
pub fn read_speed(parts: &[&[u8]], threads: usize) -> f64 {
    (0..ROUNDS).map(|_| round(parts, threads)).fold(0.0, f64::max)
}

fn round(parts: &[&[u8]], threads: usize) -> f64 {
    let start = Barrier::new(threads);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|i| {
                let start = &start;
                scope.spawn(move || {
                    start.wait();
                    one_thread(parts, i, threads)
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().expect("reading does not panic")).sum()
    })
}

/// Bytes per second of thread `i`, which reads its share of each part until the round ends.
fn one_thread(parts: &[&[u8]], i: usize, threads: usize) -> f64 {
    let start = Instant::now();
    let mut bytes = 0;
    for part in parts.iter().cycle() {
        let share = &part[part.len() * i / threads..part.len() * (i + 1) / threads];
        bytes += share.len();
        black_box(read(share));
        if start.elapsed() >= ROUND {
            break;
        }
    }
    bytes as f64 / start.elapsed().as_secs_f64()
}

/// Reads `bytes`, but for less than a line at the end of each stream, and mixes them so that none can be left out.
fn read(bytes: &[u8]) -> u64 {
    let stream = bytes.len() / STREAMS;
    let lines = |i: usize| bytes[i * stream..][..stream].chunks_exact(LINE);
    let mut mix = [0; LINE / 8];
    for (((a, b), c), d) in lines(0).zip(lines(1)).zip(lines(2)).zip(lines(3)) {
        for line in [a, b, c, d] {
            for (mix, word) in mix.iter_mut().zip(line.as_chunks().0) {
                *mix ^= u64::from_ne_bytes(*word);
            }
        }
    }
    mix.into_iter().fold(0, |a, b| a ^ b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_read() {
        let mut bytes: Vec<u8> = (0..STREAMS * LINE * 3).map(|i| (i * 31 % 251) as u8).collect();
        let whole = read(&bytes);
        for i in 0..bytes.len() {
            bytes[i] ^= 0x10;
            assert_ne!(read(&bytes), whole, "byte {i} is left out");
            bytes[i] ^= 0x10;
        }
    }

    #[test]
    fn short_parts_are_no_trouble() {
        assert!(read_speed(&[&[1; 7], &[]], 3).is_finite());
    }
}
