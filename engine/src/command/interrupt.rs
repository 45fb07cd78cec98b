//! Interrupts: Ctrl-C ends a generation if one is going on, otherwise the program.

use std::sync::atomic::{AtomicU8, Ordering::SeqCst};

/// Nothing that could be cancelled.
const IDLE: u8 = 0;
/// Something runs that looks at this.
const RUNNING: u8 = 1;
/// It shall end.
const CANCELLED: u8 = 2;

static STATE: AtomicU8 = AtomicU8::new(IDLE);

/// Sets the handler: the first interrupt within a [`Cancellable`] cancels it, any other ends the process with status
/// 130, unfinished outputs removed.
pub fn install(name: &str) {
    let handler = ctrlc::set_handler(|| {
        if STATE.compare_exchange(RUNNING, CANCELLED, SeqCst, SeqCst).is_ok() {
            return;
        }
        exit();
    });
    if let Err(error) = handler {
        eprintln!("{name}: no handler for interrupts: {error}");
    }
}

/// Ends the process as an interrupt does: with status 130, unfinished outputs removed.
pub fn exit() -> ! {
    formats::output::remove_pending();
    std::process::exit(130)
}

/// Something that an interrupt ends instead of the program, as long as this lives.
pub struct Cancellable(());

impl Cancellable {
    /// From now on.
    pub fn begin() -> Cancellable {
        STATE.store(RUNNING, SeqCst);
        Cancellable(())
    }

    /// Whether there was an interrupt.
    pub fn is_cancelled(&self) -> bool {
        STATE.load(SeqCst) == CANCELLED
    }
}

impl Drop for Cancellable {
    fn drop(&mut self) {
        STATE.store(IDLE, SeqCst);
    }
}
