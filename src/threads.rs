//! The threads that kernels run on.
//!
//! A token is some two hundred operations of a few microseconds to a few hundred, so handing out work must cost
//! next to nothing, and yet waiting threads must not burn a phone's battery or, where cores are busy with
//! something else, keep the one thread that has the work from running. So:
//!
//! * Work is handed out item by item from one counter. A thread that comes late finds less left, and one that
//!   does not come at all is not waited for: the caller waits only for items that were taken.
//! * An idle thread spins for a few microseconds, then offers its core to others, then sleeps.

use std::{
    any::Any,
    cell::UnsafeCell,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
};

/// Turns of a waiting loop that spin, before it offers the core to other threads.
const SPINS: u32 = 500;
/// Turns that offer the core, before an idle thread sleeps: long enough to bridge the sampling of a token.
const YIELDS: u32 = 200;

/// Bits of a ticket for the number of items and for the next item. The rest count the jobs and wrap around: a worker
/// that slept through exactly 2^24 jobs misses one, which nobody waits for.
const ITEM_BITS: u32 = 20;
/// Most items of one job.
///
/// A worker may count past the end twice: for the job it came for, and for one that began meanwhile.
const MAX_ITEMS: usize = (1 << ITEM_BITS) - 1 - 2 * MAX_THREADS;
/// Most threads of a pool.
pub(crate) const MAX_THREADS: usize = 512;

/// Threads to use where the user does not say: one for each performance core.
///
/// On phones and other machines with cores of several speeds, work that is shared evenly waits for the slow ones,
/// and a pool that fills them is slower than one that leaves them out.
pub(crate) fn default_threads() -> usize {
    let available = thread::available_parallelism().map_or(1, usize::from);
    performance_cores(&core_frequencies()).unwrap_or(available).min(available).min(MAX_THREADS)
}

/// Cores that reach three quarters of the highest frequency; `None` where no frequency is known.
fn performance_cores(frequencies: &[u64]) -> Option<usize> {
    let highest = *frequencies.iter().max()?;
    Some(frequencies.iter().filter(|&&frequency| frequency * 4 >= highest * 3).count())
}

/// Highest frequency of each core in kHz, as Linux and Android tell it; empty elsewhere.
fn core_frequencies() -> Vec<u64> {
    let read = |core: usize| {
        let path = format!("/sys/devices/system/cpu/cpu{core}/cpufreq/cpuinfo_max_freq");
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    };
    (0..MAX_THREADS).map_while(read).collect()
}

/// A number of threads, the caller's included, that share the items of one job at a time.
pub(crate) struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held while a job runs: a pool has one at a time.
    busy: Mutex<()>,
}

struct Shared {
    /// Job number, its number of items, and the next item: one word, so that a thread that takes an item knows
    /// for certain whose item it is.
    ticket: AtomicU64,
    /// Items of the current job that are finished.
    done: AtomicUsize,
    /// Written only while no item is taken.
    job: UnsafeCell<Option<Job>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Held by a worker from its last look at the ticket until it sleeps.
    sleep: Mutex<()>,
    wake: Condvar,
    asleep: AtomicUsize,
    stop: AtomicBool,
}

/// The function of the current job; valid until all its items are done.
type Job = *const (dyn Fn(usize) + Sync);

// SAFETY: `job` is written by the caller of `run` when no thread holds an item, and read by threads that do.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl ThreadPool {
    /// A pool of `threads` threads, 1 to [`MAX_THREADS`].
    pub fn new(threads: usize) -> std::io::Result<Self> {
        assert!((1..=MAX_THREADS).contains(&threads), "the caller checks the number of threads");
        let shared = Arc::new(Shared {
            ticket: AtomicU64::new(0),
            done: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            asleep: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
        });
        let mut pool = Self { shared, workers: Vec::new(), busy: Mutex::new(()) };
        for _ in 1..threads {
            let shared = pool.shared.clone();
            let worker = thread::Builder::new().name("transnormer".into()).spawn(move || shared.work())?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Number of threads, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `work` with each of `0..items`, on all threads; returns when all are done.
    ///
    /// A panic in `work` is passed on to the caller after the others are done. `work` must not call `run`.
    pub fn run(&self, items: usize, work: &(dyn Fn(usize) + Sync)) {
        if items <= 1 || self.workers.is_empty() {
            (0..items).for_each(work);
            return;
        }
        if items > MAX_ITEMS {
            for start in (0..items).step_by(MAX_ITEMS) {
                self.run(MAX_ITEMS.min(items - start), &|item| work(start + item));
            }
            return;
        }
        let _busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        // SAFETY: all items of the job before are done, so nothing reads the job; the lifetime is given up, but
        // this function returns only after the last item is done.
        unsafe { *shared.job.get() = Some(std::mem::transmute::<&(dyn Fn(usize) + Sync), Job>(work)) };
        shared.done.store(0, Ordering::Relaxed);
        let number = (shared.ticket.load(Ordering::Relaxed) >> (2 * ITEM_BITS)) + 1;
        shared.ticket.store(number << (2 * ITEM_BITS) | (items as u64) << ITEM_BITS, Ordering::SeqCst);
        if shared.asleep.load(Ordering::SeqCst) > 0 {
            let _sleep = shared.sleep.lock().unwrap_or_else(PoisonError::into_inner);
            shared.wake.notify_all();
        }
        shared.take_items();
        let mut turns = 0;
        while shared.done.load(Ordering::Acquire) < items {
            pause(&mut turns);
        }
        if let Some(panic) = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take() {
            resume_unwind(panic);
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(self.shared.sleep.lock());
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker cannot panic: it catches the panics of its items.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// A worker's life.
    fn work(&self) {
        let mut seen = 0; // number of the last job
        while !self.stop.load(Ordering::Relaxed) {
            seen = self.wait_for_job(seen);
            self.take_items();
        }
    }

    /// Waits until there is a job other than `seen`; returns its number.
    fn wait_for_job(&self, seen: u64) -> u64 {
        let current = || self.ticket.load(Ordering::SeqCst) >> (2 * ITEM_BITS);
        let mut turns = 0;
        while current() == seen && !self.stop.load(Ordering::SeqCst) {
            if turns < SPINS + YIELDS {
                pause(&mut turns);
                continue;
            }
            let mut sleep = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
            self.asleep.fetch_add(1, Ordering::SeqCst);
            // A job that came before the line above is seen here; one that comes after it wakes us.
            while current() == seen && !self.stop.load(Ordering::SeqCst) {
                sleep = self.wake.wait(sleep).unwrap_or_else(PoisonError::into_inner);
            }
            self.asleep.fetch_sub(1, Ordering::SeqCst);
        }
        current()
    }

    /// Takes and does items of the current job until none is left.
    fn take_items(&self) {
        const MASK: u64 = (1 << ITEM_BITS) - 1;
        loop {
            let ticket = self.ticket.fetch_add(1, Ordering::AcqRel);
            let (items, item) = (ticket >> ITEM_BITS & MASK, ticket & MASK);
            if item >= items {
                return;
            }
            // SAFETY: the item is taken and not done, so the job is set and stays.
            let work = unsafe { &*(*self.job.get()).expect("a job with items is set") };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| work(item as usize))) {
                self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
            }
            self.done.fetch_add(1, Ordering::AcqRel);
        }
    }
}

/// One turn of a waiting loop.
fn pause(turns: &mut u32) {
    if *turns < SPINS {
        std::hint::spin_loop();
    } else {
        thread::yield_now();
    }
    *turns = turns.saturating_add(1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_of_every_job_is_done_once() {
        for threads in [1, 2, 3, 8] {
            let pool = ThreadPool::new(threads).unwrap();
            assert_eq!(pool.threads(), threads);
            for job in 0..2000 {
                let items = job % 37;
                let counts: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                pool.run(items, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "job {job}");
                if job % 500 == 0 {
                    thread::sleep(std::time::Duration::from_millis(20)); // let the workers fall asleep
                }
            }
        }
    }

    #[test]
    fn slow_cores_are_left_out() {
        assert_eq!(performance_cores(&[]), None);
        assert_eq!(performance_cores(&[2_000_000; 4]), Some(4));
        let phone = [1_800_000, 1_800_000, 1_800_000, 1_800_000, 2_420_000, 2_420_000, 2_420_000, 2_840_000];
        assert_eq!(performance_cores(&phone), Some(4));
        assert!(default_threads() >= 1);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = ThreadPool::new(3).unwrap();
        let result = catch_unwind(AssertUnwindSafe(|| pool.run(10, &|i| assert_ne!(i, 7, "seven"))));
        assert!(result.is_err());
        let sum = AtomicUsize::new(0);
        pool.run(10, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }
}
