//! A few threads that share the tasks of one operation after another.
//!
//! A token is some hundred operations of microseconds to milliseconds each, so handing one over must cost a microsecond,
//! and a thread that the system interrupts must not hold up the rest: tasks are taken one by one from a counter, and a
//! thread that comes late finds none left. Waiting spins for a few microseconds only and then sleeps, so that other
//! processes get the processor.
//!
//! ```text
//! gate   [ number of the operation | open | threads inside ]
//! ```
//! A thread enters while the gate is open; the caller closes it when the tasks are taken and returns when nobody is
//! inside any more.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;

/// Times that a waiting thread looks again before it sleeps: about five microseconds.
const SPINS: usize = 100;

const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;
const OPERATION: u64 = 1 << 32;

/// Threads, the calling one included.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held by the operation under way.
    busy: Mutex<()>,
}

#[derive(Default)]
struct Shared {
    gate: AtomicU64,
    job: Mutex<Option<Job>>,
    next: AtomicUsize,
    sleeping: AtomicUsize,
    caller_sleeps: AtomicBool,
    ends: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    lock: Mutex<()>,
    opened: Condvar,
    left: Condvar,
}

/// The operation under way.
#[derive(Clone, Copy)]
struct Job {
    task: &'static (dyn Fn(usize) + Sync),
    tasks: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// A pool of `threads` threads, of which one less is started (fewer where the system refuses).
    pub fn new(threads: usize) -> Pool {
        let shared = Arc::new(Shared::default());
        let workers = (1..threads).map_while(|index| {
            let shared = shared.clone();
            std::thread::Builder::new().name(format!("native-{index}")).spawn(move || shared.work()).ok()
        });
        let workers = workers.collect();
        Pool { shared, workers, busy: Mutex::new(()) }
    }

    /// How many there are.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task` once with each number below `tasks`, on any thread, and returns when all calls have. Where the pool
    /// is in use, by another thread or by the caller itself, the calls are made one after the other here.
    ///
    /// A panic of a task is continued here, after all threads have left.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        let busy = match self.busy.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        let Some(_busy) = busy.filter(|_| tasks > 1 && !self.workers.is_empty()) else {
            return (0..tasks).for_each(task);
        };
        // SAFETY: the reference is used by threads inside the gate only, and by this call, which ends (`Close`) when the
        // gate is closed and nobody is inside.
        let task =
            unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(task) };
        let job = Job { task, tasks };
        *lock(&shared.panic) = None;
        *lock(&shared.job) = Some(job);
        shared.next.store(0, Ordering::Relaxed);
        shared.gate.fetch_add(OPERATION | OPEN, Ordering::SeqCst);
        let close = Close(shared);
        if shared.sleeping.load(Ordering::SeqCst) > 0 {
            drop(lock(&shared.lock));
            shared.opened.notify_all();
        }
        shared.take(job);
        drop(close);
        let panic = lock(&shared.panic).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

/// Closes the gate and waits until nobody is inside.
struct Close<'a>(&'a Shared);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        let shared = self.0;
        shared.gate.fetch_and(!OPEN, Ordering::SeqCst);
        let nobody = || shared.gate.load(Ordering::SeqCst) & INSIDE == 0;
        if !spin(nobody) {
            let mut guard = lock(&shared.lock);
            shared.caller_sleeps.store(true, Ordering::SeqCst);
            while !nobody() {
                guard = shared.left.wait(guard).unwrap_or_else(PoisonError::into_inner);
            }
            shared.caller_sleeps.store(false, Ordering::SeqCst);
        }
        *lock(&shared.job) = None;
    }
}

/// Whether something happens within a few microseconds.
fn spin(happened: impl Fn() -> bool) -> bool {
    (0..SPINS).any(|_| {
        std::hint::spin_loop();
        happened()
    })
}

impl Shared {
    /// A thread's life.
    fn work(&self) {
        let mut last = 0;
        // An operation that this thread has not been in yet.
        let opened = |last: u64| {
            let gate = self.gate.load(Ordering::SeqCst);
            (gate & OPEN != 0 && gate / OPERATION != last).then_some(gate)
        };
        loop {
            if let Some(gate) = opened(last) {
                if self.gate.compare_exchange(gate, gate + 1, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                    last = gate / OPERATION;
                    self.visit();
                }
                continue;
            }
            if self.ends.load(Ordering::SeqCst) {
                return;
            }
            let wakes = || opened(last).is_some() || self.ends.load(Ordering::SeqCst);
            if !spin(wakes) {
                let mut guard = lock(&self.lock);
                self.sleeping.fetch_add(1, Ordering::SeqCst);
                while !wakes() {
                    guard = self.opened.wait(guard).unwrap_or_else(PoisonError::into_inner);
                }
                self.sleeping.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }

    /// What a thread does between entering and leaving.
    fn visit(&self) {
        let job = *lock(&self.job);
        if let Some(job) = job
            && let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.take(job)))
        {
            *lock(&self.panic) = Some(panic);
        }
        let before = self.gate.fetch_sub(1, Ordering::SeqCst);
        if before & INSIDE == 1 && self.caller_sleeps.load(Ordering::SeqCst) {
            drop(lock(&self.lock));
            self.left.notify_all();
        }
    }

    /// Does tasks until none is left.
    fn take(&self, job: Job) {
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= job.tasks {
                return;
            }
            (job.task)(task);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.lock));
        self.shared.opened.notify_all();
        for worker in self.workers.drain(..) {
            // It has caught every panic.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often each task was called.
    fn counts(pool: &Pool, tasks: usize) -> Vec<usize> {
        let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
        pool.run(tasks, &|task| {
            counts[task].fetch_add(1, Ordering::Relaxed);
        });
        counts.into_iter().map(AtomicUsize::into_inner).collect()
    }

    #[test]
    fn every_task_is_done_once_whatever_the_number_of_threads() {
        for threads in [0, 1, 2, 3, 16] {
            let pool = Pool::new(threads);
            for round in 0..300 {
                let tasks = round % 40;
                assert_eq!(counts(&pool, tasks), vec![1; tasks], "{threads} threads, {tasks} tasks");
            }
        }
    }

    #[test]
    fn threads_that_slept_wake_up_and_are_waited_for() {
        let pool = Pool::new(4);
        for _ in 0..5 {
            std::thread::sleep(std::time::Duration::from_millis(2));
            let done = AtomicUsize::new(0);
            pool.run(8, &|_| {
                std::thread::sleep(std::time::Duration::from_millis(1));
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 8);
        }
    }

    #[test]
    fn operations_inside_operations_and_beside_them_are_done_in_place() {
        let pool = Pool::new(3);
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        pool.run(5, &|_| {
                            pool.run(7, &|_| {
                                total.fetch_add(1, Ordering::Relaxed);
                            })
                        });
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * 50 * 5 * 7);
    }

    #[test]
    fn a_panic_of_a_task_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(4);
        for culprit in 0..8 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.run(8, &|task| {
                    std::thread::sleep(std::time::Duration::from_micros(200));
                    if task == culprit {
                        resume_unwind(Box::new("culprit"));
                    }
                });
            }));
            assert_eq!(caught.unwrap_err().downcast_ref(), Some(&"culprit"));
            assert_eq!(counts(&pool, 20), vec![1; 20]);
        }
    }
}
