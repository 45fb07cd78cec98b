//! Measurements and the table of their ratios.

use std::time::Duration;

use criterion::{Criterion, Throughput};
use engine::backend::Device;
use serde::Serialize;

/// Measurements of a case.
const SAMPLES: usize = 10;

/// How a case's weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stored {
    /// As a file has them.
    Mxfp4,
    /// The baseline: dequantised beforehand.
    Bf16,
}

impl Stored {
    fn name(self) -> &'static str {
        match self {
            Stored::Mxfp4 => "mxfp4",
            Stored::Bf16 => "bf16",
        }
    }

    /// Bytes of 32 values.
    pub fn bytes_of_32(self) -> usize {
        match self {
            Stored::Mxfp4 => 17,
            Stored::Bf16 => 64,
        }
    }
}

/// What limits a case.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// Bytes that must be read, and written where that is much.
    Bytes(u64),
    /// Floating-point operations.
    Operations(u64),
}

/// What is measured.
#[derive(Clone, Debug, Serialize)]
pub struct Case {
    pub group: &'static str,
    pub name: String,
    /// `None` where it has no experts' weights.
    pub stored: Option<Stored>,
    pub work: Work,
}

impl Case {
    fn id(&self) -> String {
        match self.stored {
            Some(stored) => format!("{}, {}", self.name, stored.name()),
            None => self.name.clone(),
        }
    }
}

/// The median of a case.
#[derive(Clone, Debug, Serialize)]
struct Row {
    /// `cpu`, `wgpu` or `cuda`.
    backend: &'static str,
    /// As the device calls itself.
    device: String,
    shapes: &'static str,
    #[serde(flatten)]
    case: Case,
    seconds: f64,
    /// Of [`Work`], a second.
    rate: f64,
    /// The rate over that of the copy; of bytes.
    of_copy: Option<f64>,
    /// The time of the same work on bf16 over this one; of packed weights.
    faster_than_bf16: Option<f64>,
}

/// All measurements of a run.
pub struct Suite {
    criterion: Criterion,
    backend: &'static str,
    device: String,
    shapes: &'static str,
    rows: Vec<Row>,
}

impl Suite {
    /// Takes criterion's options from the command line.
    pub fn new() -> Suite {
        let criterion = Criterion::default()
            .without_plots()
            .sample_size(SAMPLES)
            .warm_up_time(Duration::from_millis(300))
            .measurement_time(Duration::from_secs(1))
            .configure_from_args();
        Suite { criterion, backend: "", device: String::new(), shapes: "", rows: Vec::new() }
    }

    /// Whether each case is only to run once.
    pub fn is_test(&self) -> bool {
        let given = |option: &str| std::env::args().any(|argument| argument == option);
        given("--test") || !given("--bench")
    }

    /// Names the device of what follows.
    pub fn on(&mut self, device: &Device, shapes: &'static str) {
        self.backend = device.backend().name();
        self.device = device.name().to_owned();
        self.shapes = shapes;
    }

    /// Measures a case, if it is wanted. What `prepare` returns runs some iterations and returns the time that they took.
    pub fn measure<R: FnMut(u64) -> Duration>(&mut self, case: Case, prepare: impl FnOnce() -> R) {
        let mut seconds = Vec::new();
        let mut prepare = Some(prepare);
        let mut run = None;
        let mut group = self.criterion.benchmark_group(format!("{}/{}", self.backend, case.group));
        group.throughput(match case.work {
            Work::Bytes(bytes) => Throughput::BytesDecimal(bytes),
            Work::Operations(operations) => Throughput::Elements(operations),
        });
        group.bench_function(case.id(), |bencher| {
            let run = run.get_or_insert_with(|| prepare.take().expect("prepared once")());
            bencher.iter_custom(|iterations| {
                let elapsed = run(iterations);
                seconds.push(elapsed.as_secs_f64() / iterations as f64);
                elapsed
            });
        });
        group.finish();
        // What comes before the samples is criterion's warm-up.
        seconds.drain(..seconds.len().saturating_sub(SAMPLES));
        let Some(median) = median(seconds) else { return };
        let (Work::Bytes(amount) | Work::Operations(amount)) = case.work;
        self.rows.push(Row {
            backend: self.backend,
            device: self.device.clone(),
            shapes: self.shapes,
            case,
            seconds: median,
            rate: amount as f64 / median,
            of_copy: None,
            faster_than_bf16: None,
        });
    }

    /// Prints the table, and writes it where `KERNELS_JSON` says.
    pub fn finish(mut self) -> Result<(), Box<dyn std::error::Error>> {
        self.criterion.final_summary();
        self.compare();
        for rows in self.rows.chunk_by(|a, b| a.backend == b.backend) {
            let Row { backend, device, shapes, .. } = &rows[0];
            println!(
                "\n{backend}: {device}, {shapes} shapes{}",
                if self.is_test() { ", each once" } else { "" }
            );
            println!("{:<46}{:>12}{:>16}{:>13}{:>15}", "", "time", "rate", "of the copy", "against bf16");
            for row in rows {
                println!("{row}");
            }
        }
        if let Some(path) = std::env::var_os("KERNELS_JSON") {
            std::fs::write(path, serde_json::to_string_pretty(&self.rows)? + "\n")?;
        }
        Ok(())
    }

    /// Fills in the ratios.
    fn compare(&mut self) {
        let all = self.rows.clone();
        for row in &mut self.rows {
            let same_device = || all.iter().filter(|other| other.backend == row.backend);
            if let Work::Bytes(_) = row.case.work {
                let copy = same_device().find(|other| other.case.group == "copy");
                row.of_copy = copy.map(|copy| row.rate / copy.rate);
            }
            if row.case.stored == Some(Stored::Mxfp4) {
                let baseline = same_device().find(|other| {
                    other.case.stored == Some(Stored::Bf16)
                        && (other.case.group, &other.case.name) == (row.case.group, &row.case.name)
                });
                row.faster_than_bf16 = baseline.map(|baseline| baseline.seconds / row.seconds);
            }
        }
    }
}

/// `None` where there are no values, for the case was not wanted.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let count = values.len();
    Some((values.get(count / 2)? + values[(count - 1) / 2]) / 2.0)
}

/// Three digits and the prefix of a unit.
fn scaled(value: f64, unit: &str) -> String {
    const PREFIXES: [(f64, &str); 6] =
        [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m")];
    let (size, prefix) = PREFIXES.into_iter().find(|(size, _)| value >= *size).unwrap_or((1e-6, "µ"));
    let value = value / size;
    let digits = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
    format!("{value:.digits$} {prefix}{unit}")
}

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let unit = match self.case.work {
            Work::Bytes(_) => "B/s",
            Work::Operations(_) => "FLOP/s",
        };
        let (time, rate) = (scaled(self.seconds, "s"), scaled(self.rate, unit));
        let percent = self.of_copy.map_or(String::new(), |ratio| format!("{:.0} %", ratio * 100.0));
        let factor = self.faster_than_bf16.map_or(String::new(), |ratio| format!("{ratio:.2} x"));
        let case = format!("{}: {}", self.case.group, self.case.id());
        write!(f, "{case:<46}{time:>12}{rate:>16}{percent:>13}{factor:>15}")
    }
}
