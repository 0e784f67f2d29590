//! A session's memory does not grow with what it reads, but for the ledger's four bytes per token.

mod common;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering},
};

use common::{A, Case, session};

/// The system's allocator, counting.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(block, layout, size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const TOKENS: usize = 20_000;

/// The only test of this program: another one's allocations would be counted too.
#[test]
fn decoding_allocates_nothing() {
    let case = Case::open(A);
    let model = case.model();
    let ids = case.ids("input_ids");
    let mut session = session(&model, 64, 2);
    session.read(&ids).expect("valid ids");
    ids.iter().for_each(|id| session.read(&[*id]).expect("a valid id"));

    let (state_bytes, buffer_bytes) = (session.state().bytes(), session.buffer_bytes());
    assert_eq!(state_bytes, 4 * (4 * 32 * 16 + 4 * 16 * 16), "(heads, key_dim, head_dim) of both layers");
    let resident = resident_bytes();
    let mut growths = 0;
    for id in ids.iter().cycle().take(TOKENS) {
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        session.read(&[*id]).expect("a valid id");
        growths += usize::from(ALLOCATIONS.load(Ordering::Relaxed) > before);
    }
    // The ledger doubles: from 1,200 tokens to 21,200 no more than five times.
    assert!(growths <= 5, "{growths} of {TOKENS} tokens allocated memory");
    assert_eq!(session.tokens().len(), TOKENS + 2 * ids.len());
    assert_eq!((session.state().bytes(), session.buffer_bytes()), (state_bytes, buffer_bytes));
    assert!(session.logits().iter().all(|logit| logit.is_finite()));
    // ggml's own allocations are not counted above, but would show here.
    if let (Some(before), Some(after)) = (resident, resident_bytes()) {
        assert!(after < before + (1 << 20), "{before} bytes resident grew to {after}");
    }
}

/// Bytes of memory that the process holds, where the system tells.
fn resident_bytes() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.parse::<usize>().ok().map(|kib| kib * 1024)
}
