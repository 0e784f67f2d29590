//! A session's memory does not grow with what it reads.

mod common;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

use common::small_model;
use transnormer::{Session, SessionOptions};

/// The system's allocator, counting.
struct Counting;

thread_local! {
    /// Of one thread: the one that runs the tests allocates when it reports a slow one.
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
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
const LEDGER: usize = 1_000;

/// The only test of this program: another one's allocations would be counted too.
#[test]
fn decoding_allocates_nothing() {
    let model = small_model(1);
    let ids: Vec<u32> = (0..128).collect();
    let options = SessionOptions { threads: 1, block: 64, checkpoints: 2, ledger: LEDGER };
    let mut session = Session::new(&model, &options).expect("valid options");
    session.read(&ids).expect("valid ids");
    for id in &ids {
        session.read(&[*id]).expect("a valid id");
        session.checkpoint().expect("checkpoints are kept");
    }

    let (state_bytes, buffer_bytes) = (session.state().bytes(), session.buffer_bytes());
    assert_eq!(state_bytes, 4 * (2 * 8 * 4 + 2 * 4 * 4), "(heads, key_dim, head_dim) of both layers");
    let resident = resident_bytes();
    let before = ALLOCATIONS.get();
    for (i, id) in ids.iter().cycle().take(TOKENS).enumerate() {
        session.read(&[*id]).expect("a valid id");
        if i % 100 == 0 {
            session.checkpoint().expect("checkpoints are kept");
        }
    }
    assert_eq!(ALLOCATIONS.get(), before, "allocations");
    assert_eq!(session.position() as usize, TOKENS + 2 * ids.len());
    assert_eq!(session.tokens().len(), LEDGER);
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
