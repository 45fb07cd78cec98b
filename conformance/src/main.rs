//! The `conformance` command: the suite against any implementation, its inputs as files, its goldens made again.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use conformance::cases::{self, Case, Input};
use conformance::checkpoint::Checkpoint;
use conformance::contract::{self, Mark};

/// The conformance suite of model.bin.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run every case against an implementation; exit with 1 if a verdict is wrong.
    Run {
        /// Its command, for example "target/release/modelbin"; the contract is in conformance/README.md.
        #[arg(long, value_name = "CMD")]
        against: String,
        /// Ask for rule ids and byte ranges too, not for verdicts only.
        #[arg(long)]
        exact: bool,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// List the cases: name, rule, reason.
    List,
    /// Write the inputs of all cases into a folder, for implementations without a command line.
    Write {
        /// The folder.
        folder: PathBuf,
    },
    /// Make fixtures, snapshots and the tables of the specification again. For developers of this repository.
    Bless,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().verb {
        Verb::Run { against, exact, json } => run(&against, exact, json),
        Verb::List => {
            for Case { name, rule, rationale, .. } in cases::all() {
                println!("{name:40} {rule:24} {rationale}");
            }
            Ok(true)
        }
        Verb::Write { folder } => write(&folder).map(|()| true),
        Verb::Bless => bless().map(|()| true),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("conformance: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(command: &str, exact: bool, json: bool) -> Result<bool> {
    let outcomes = contract::run(command)?;
    let bad = |mark| mark == Mark::Failed || exact && mark != Mark::Exact;
    let count = |mark| outcomes.iter().filter(|outcome| outcome.mark == mark).count();
    if json {
        println!("{:#}", serde_json::to_value(&outcomes)?);
    } else {
        for outcome in outcomes.iter().filter(|outcome| outcome.mark != Mark::Exact) {
            println!("{:?}: {} ({}): {}", outcome.mark, outcome.case, outcome.rule, outcome.remark);
        }
        let [exact, verdict, failed] = [Mark::Exact, Mark::Verdict, Mark::Failed].map(count);
        println!("{exact} exact, {verdict} with the right verdict only, {failed} failed");
    }
    Ok(!outcomes.iter().any(|outcome| bad(outcome.mark)))
}

fn write(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    let base = folder.join("base-checkpoint");
    fs::create_dir_all(&base)?;
    Case::write_base_checkpoint(&base)?;
    for case in cases::all() {
        match &case.input {
            Input::File(bytes) => fs::write(folder.join(format!("{}.bin", case.name)), bytes)?,
            Input::Against(bytes) => fs::write(folder.join(format!("{}.against.bin", case.name)), bytes)?,
            Input::Checkpoint(change) => {
                let path = folder.join(&case.name);
                fs::create_dir_all(&path)?;
                let mut checkpoint = Checkpoint::base()?;
                change(&mut checkpoint);
                checkpoint.write(&path)?;
            }
        }
    }
    Ok(())
}

fn bless() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for path in conformance::spec_tables::bless(&root)? {
        println!("wrote {}", path.display());
    }
    for arguments in [
        &["run", "--release", "-p", "fixtures", "--", "regenerate"][..],
        &["test", "-p", "conformance", "conformance"],
    ] {
        let status = Command::new("cargo")
            .args(arguments)
            .current_dir(&root)
            .env("INSTA_UPDATE", "always")
            .status()
            .context("cargo")?;
        ensure!(status.success(), "cargo {} failed", arguments.join(" "));
    }
    Ok(())
}
