//! The progress of sampling: a bar on a terminal, a line now and then elsewhere.

use std::cell::RefCell;
use std::io::{self, IsTerminal};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use engine::ace_step::sampling::Step;
use engine::command::interrupt::Cancellable;
use formats::command::{Console, bar};
use indicatif::{HumanDuration, ProgressBar};

/// Lines elsewhere are at least so far apart.
const PAUSE: Duration = Duration::from_secs(10);

/// Shows steps, and ends them at an interrupt.
pub struct Steps {
    cancellable: Cancellable,
    start: Instant,
    shown: RefCell<Shown>,
}

enum Shown {
    Nothing,
    Bar(Option<ProgressBar>),
    Lines { last: Instant },
}

impl Steps {
    pub fn begin(console: &Console) -> Steps {
        console.done();
        let start = Instant::now();
        let shown = match () {
            () if console.quiet => Shown::Nothing,
            () if io::stderr().is_terminal() => Shown::Bar(None),
            () => Shown::Lines { last: start },
        };
        Steps { cancellable: Cancellable::begin(), start, shown: RefCell::new(shown) }
    }

    /// To be called after each step.
    pub fn step(&self, step: &Step) -> ControlFlow<()> {
        let elapsed = self.start.elapsed();
        match &mut *self.shown.borrow_mut() {
            Shown::Nothing => {}
            Shown::Bar(bar_of_steps) => {
                let bar = bar_of_steps.get_or_insert_with(|| {
                    bar("sampling", step.total as u64, "{pos:>4} of {len} steps  {per_sec}")
                });
                bar.set_position(step.done as u64);
                if step.done == step.total {
                    bar.finish_and_clear();
                }
            }
            Shown::Lines { last } => {
                if last.elapsed() >= PAUSE || step.done == step.total {
                    *last = Instant::now();
                    let rate = step.done as f64 / elapsed.as_secs_f64();
                    let left = Duration::from_secs_f64((step.total - step.done) as f64 / rate);
                    eprintln!(
                        "sampling: {} of {} steps, {rate:.2} steps/s, {} left",
                        step.done,
                        step.total,
                        HumanDuration(left)
                    );
                }
            }
        }
        if self.cancellable.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// Seconds since the start.
    pub fn seconds(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }
}
