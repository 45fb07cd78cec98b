//! The speeds that this project promises, measured side by side. Prints medians and ratios; asserts nothing.
//!
//! ```text
//! cargo bench -p conformance --bench speed                    # all of it, 2 GB on disk, a few minutes
//! cargo bench -p conformance --bench speed -- decode verify   # parts
//! ```
//! `export` compares with `cp` and, where `conformance/parity/setup.sh` has been run, with the genuine exporter.

use std::fs::{self, File};
use std::hint::black_box;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use conformance::synthetic::Synthetic;
use fixtures::checkpoint::{Form, Layout, Spec, write};
use formats::model_bin::header::ModelHeader;
use formats::model_bin::verify::verify;
use formats::model_bin::write::plan;
use formats::model_bin::{Depth, Verified};
use formats::mxfp4;
use formats::vocabulary::Vocabulary;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;

/// Alternations of the programs that are compared.
const ROUNDS: usize = 5;

fn main() -> Result<()> {
    let wanted: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let want = |part: &str| wanted.is_empty() || wanted.iter().any(|wanted| wanted == part);
    let folder = tempfile::Builder::new().prefix("modelbin-speed-").tempdir_in(std::env::temp_dir())?;
    if want("decode") {
        decode();
    }
    if want("structure") {
        structure(folder.path())?;
    }
    if want("export") || want("verify") {
        let spec = Spec {
            layers: 8,
            experts: 32,
            hidden: 1440,
            intermediate: 1440,
            heads: 16,
            kv_heads: 4,
            ..Spec::default()
        };
        let checkpoint = folder.path().join("checkpoint");
        println!("generating a checkpoint of 8 blocks, 32 experts, hidden 1440 …");
        write(&spec, Form::new(Layout::Original, 2), &checkpoint)?;
        let model = folder.path().join("model.bin");
        run(Command::new(modelbin()?)
            .args(["export", "--quiet", "-s"])
            .arg(&checkpoint)
            .arg("-d")
            .arg(&model))?;
        if want("verify") {
            values(&model)?;
        }
        if want("export") {
            export(folder.path(), &checkpoint, &model)?;
        }
    }
    Ok(())
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The release build of the command, made now if need be.
fn modelbin() -> Result<PathBuf> {
    let status = Command::new("cargo")
        .args(["build", "--quiet", "--release", "-p", "formats"])
        .current_dir(root())
        .status()?;
    ensure!(status.success(), "cargo build --release -p formats failed");
    // This program is target/release/deps/speed-….
    let own = std::env::current_exe()?;
    let release = own.parent().and_then(Path::parent).context("the folder of this program")?;
    Ok(release.join("modelbin"))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Median seconds of repeated calls.
fn seconds(rounds: usize, mut call: impl FnMut()) -> f64 {
    let once = |call: &mut dyn FnMut()| {
        let start = Instant::now();
        call();
        start.elapsed().as_secs_f64()
    };
    median((0..rounds).map(|_| once(&mut call)).collect())
}

fn decode() {
    const OUT: usize = 1 << 18;
    let blocks: Vec<u8> = (0..OUT / 2).map(|index| ((index * 197) >> 3) as u8).collect();
    let scales: Vec<u8> = (0..OUT / 32).map(|index| 100 + (index % 40) as u8).collect();
    let mut out = vec![0f32; OUT];
    let fast = seconds(201, || mxfp4::decode(&blocks, &scales, black_box(&mut out)).expect("lengths agree"));
    let reference = seconds(11, || {
        for (index, out) in black_box(&mut out).iter_mut().enumerate() {
            let code = (blocks[index / 2] >> (index % 2 * 4)) & 15;
            *out = mxfp4::value(code, scales[index / 32]);
        }
    });
    let from = vec![1f32; OUT];
    let copy = seconds(201, || black_box(&mut out).copy_from_slice(black_box(&from)));
    let rate = |seconds: f64| (OUT * 4) as f64 / seconds / 1e9;
    println!(
        "MXFP4 → f32, one core, 1 MiB: {:.1} GB/s of output, {:.2} × a copy, {:.0} × the reference",
        rate(fast),
        copy / fast,
        reference / fast
    );
}

/// A sparse file of the true 20b layout.
fn structure(folder: &Path) -> Result<()> {
    let model = Synthetic::new(ModelHeader::GPT_OSS_20B, Vocabulary::o200k().clone(), 0)?;
    let file = plan(&model)?;
    let path = folder.join("sparse.bin");
    let mut prefix = std::io::Cursor::new(Vec::new());
    let payload = formats::model_bin::write::SourcePayload::new(&model, &());
    binrw::BinWrite::write_le_args(&file.prefix, &mut prefix, &payload)?;
    let mut out = File::create(&path)?;
    out.write_all(prefix.get_ref())?;
    out.set_len(file.weights.end())?;
    let open = seconds(21, || {
        black_box(Verified::open(&path, Depth::Structure, &()).expect("a valid file"));
    });
    println!("structure of a sparse 20b file, {} bytes: {:.1} ms", file.weights.end(), open * 1e3);
    fs::remove_file(path)?;
    Ok(())
}

fn values(model: &Path) -> Result<()> {
    // SAFETY: the file was made by this program, which nothing else writes to.
    let bytes = unsafe { memmap2::Mmap::map(&File::open(model)?)? };
    let full = seconds(ROUNDS, || assert!(verify(&bytes, Depth::Full, &()).is_valid()));
    let hash = seconds(ROUNDS, || {
        black_box(blake3::Hasher::new().update_rayon(&bytes).finalize());
    });
    let rate = |seconds: f64| bytes.len() as f64 / seconds / 1e9;
    println!(
        "values of {:.2} GB: verified at {:.1} GB/s, BLAKE3 on all cores {:.1} GB/s: {:.1} × its speed",
        bytes.len() as f64 / 1e9,
        rate(full),
        rate(hash),
        hash / full
    );
    Ok(())
}

/// Wall and CPU seconds and peak resident bytes of one run, a sync included.
struct Cost {
    wall: f64,
    cpu: f64,
    peak: u64,
}

fn cpu_of_children() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let seconds = |time: TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}

fn run(command: &mut Command) -> Result<Cost> {
    let cpu = cpu_of_children()?;
    let start = Instant::now();
    let mut child =
        command.stdout(std::process::Stdio::null()).spawn().with_context(|| format!("{command:?}"))?;
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    let exit = loop {
        if let Some(exit) = child.try_wait()? {
            break exit;
        }
        // VmHWM only grows, so the last look before the end is the peak.
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
        peak = peak.max(line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0) * 1024);
        thread::sleep(Duration::from_millis(2));
    };
    ensure!(exit.success(), "{command:?} failed");
    ensure!(Command::new("sync").status()?.success(), "sync failed");
    Ok(Cost { wall: start.elapsed().as_secs_f64(), cpu: cpu_of_children()? - cpu, peak })
}

fn export(folder: &Path, checkpoint: &Path, model: &Path) -> Result<()> {
    let modelbin = modelbin()?;
    let out = folder.join("out.bin");
    let parity = root().join(".parity");
    let python = parity.join("venv/bin/python");
    let mut commands = vec![("modelbin export", Command::new(modelbin)), ("cp", Command::new("cp"))];
    commands[0].1.args(["export", "--quiet", "-s"]).arg(checkpoint).arg("-d").arg(&out);
    commands[1].1.arg(model).arg(&out);
    if python.exists() {
        let mut command = Command::new(python);
        command
            .arg(parity.join("gpt-oss/gpt_oss/metal/scripts/create-local-model.py"))
            .env("TIKTOKEN_CACHE_DIR", parity.join("tiktoken-cache"))
            .env("TIKTOKEN_ENCODINGS_BASE", parity.join("encodings"))
            .stderr(std::process::Stdio::null());
        command.arg("-s").arg(checkpoint).arg("-d").arg(&out);
        commands.push(("genuine exporter", command));
    } else {
        println!("the genuine exporter is not installed: run conformance/parity/setup.sh to compare with it");
    }
    // Everything is in the page cache from here on, for all alike.
    for file in fs::read_dir(checkpoint)? {
        std::io::copy(&mut File::open(file?.path())?, &mut std::io::sink())?;
    }
    let mut costs: Vec<Vec<Cost>> = commands.iter().map(|_| Vec::new()).collect();
    for _ in 0..ROUNDS {
        for ((_, command), costs) in commands.iter_mut().zip(&mut costs) {
            if out.exists() {
                fs::remove_file(&out)?;
            }
            costs.push(run(command)?);
        }
    }
    println!(
        "export of {:.2} GB with a sync, median of {ROUNDS} alternations:",
        fs::metadata(model)?.len() as f64 / 1e9
    );
    let ours = summary(&costs[0]);
    for ((name, _), costs) in commands.iter().zip(&costs) {
        let cost = summary(costs);
        println!(
            "  {name:18} {:6.2} s wall, {:5.2} s CPU, {:5.0} MB peak; modelbin / this: {:.2} wall, {:.2} CPU",
            cost.wall,
            cost.cpu,
            cost.peak as f64 / 1e6,
            ours.wall / cost.wall,
            ours.cpu / cost.cpu
        );
    }
    Ok(())
}

fn summary(costs: &[Cost]) -> Cost {
    let pick = |field: fn(&Cost) -> f64| median(costs.iter().map(field).collect());
    Cost {
        wall: pick(|cost| cost.wall),
        cpu: pick(|cost| cost.cpu),
        peak: costs.iter().map(|cost| cost.peak).max().unwrap_or(0),
    }
}
