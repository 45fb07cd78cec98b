//! Runs the cases against any implementation that has a command line.
//!
//! The contract (also in `conformance/README.md`): a command `CMD` for which
//!
//! | call | must |
//! |---|---|
//! | `CMD verify FILE` | exit with 0 if FILE is valid, with 1 if not |
//! | `CMD verify FILE --against DIR` | exit with 0 if FILE is what DIR exports to, with 1 if not |
//! | `CMD export --src DIR --dst FILE` | exit with 0 and write FILE, or exit with another status and leave no FILE |
//!
//! DIR is an original-layout checkpoint; its `vocabulary.json` holds the vocabulary of 300 tokens
//! (`{"regex": …, "special_uuids": […], "tokens": [base64, …]}`). An implementation that knows rule ids earns a second
//! mark: its output should contain the id of the broken rule and, for files, the range of bytes as `START..END`.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use formats::rules::Level;
use serde::Serialize;

use crate::cases::{self, BASE, Case, Input};
use crate::checkpoint::Checkpoint;

/// How an implementation did on one case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mark {
    /// Right verdict, and the output names rule and range.
    Exact,
    /// Right verdict.
    Verdict,
    /// Wrong verdict, a crash, or something left behind.
    Failed,
}

/// One row of the result.
#[derive(Debug, Serialize)]
pub struct Outcome {
    /// The case.
    pub case: String,
    /// The rule's id; empty for the valid inputs.
    pub rule: &'static str,
    /// How it went.
    pub mark: Mark,
    /// The exit status and what was missing, where it did not go well.
    pub remark: String,
}

/// Runs every case, and the valid inputs that they were made from. `command` is split at spaces.
pub fn run(command: &str) -> Result<Vec<Outcome>> {
    let folder = tempfile::tempdir()?;
    let contract = Contract { command: command.split_whitespace().collect(), folder: folder.path() };
    let mut outcomes = contract.valid()?;
    for case in cases::all() {
        outcomes.push(contract.case(&case).with_context(|| case.name.clone())?);
    }
    Ok(outcomes)
}

struct Contract<'a> {
    command: Vec<&'a str>,
    folder: &'a Path,
}

impl Contract<'_> {
    /// The exit status and all that was printed.
    fn call(&self, arguments: &[&str]) -> Result<(Option<i32>, String)> {
        let [program, fixed @ ..] = self.command.as_slice() else { bail!("an empty command") };
        let output = Command::new(program)
            .args(fixed)
            .args(arguments)
            .output()
            .with_context(|| program.to_string())?;
        let printed = [output.stdout, output.stderr].concat();
        Ok((output.status.code(), String::from_utf8_lossy(&printed).into_owned()))
    }

    fn path(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    /// An empty folder.
    fn checkpoint(&self, checkpoint: &Checkpoint) -> Result<String> {
        let path = self.path("checkpoint");
        if Path::new(&path).exists() {
            std::fs::remove_dir_all(&path)?;
        }
        std::fs::create_dir(&path)?;
        checkpoint.write(Path::new(&path))?;
        Ok(path)
    }

    /// The base file and the base checkpoint have to pass: a command that always fails proves nothing.
    fn valid(&self) -> Result<Vec<Outcome>> {
        let (file, exported) = (self.path("base.bin"), self.path("exported.bin"));
        std::fs::write(&file, BASE)?;
        let checkpoint = self.checkpoint(&Checkpoint::base()?)?;
        let mut outcomes = Vec::new();
        for (case, arguments) in [
            ("valid-file", vec!["verify", &file]),
            ("valid-file-against-checkpoint", vec!["verify", &file, "--against", &checkpoint]),
            ("valid-checkpoint", vec!["export", "--src", &checkpoint, "--dst", &exported]),
        ] {
            let (status, printed) = self.call(&arguments)?;
            let fine = status == Some(0)
                && (case != "valid-checkpoint" || std::fs::read(&exported).is_ok_and(|bytes| bytes == BASE));
            let mark = if fine { Mark::Exact } else { Mark::Failed };
            let remark = if fine { String::new() } else { format!("exit status {status:?}: {printed}") };
            outcomes.push(Outcome { case: case.into(), rule: "", mark, remark });
        }
        Ok(outcomes)
    }

    fn case(&self, case: &Case) -> Result<Outcome> {
        let file = self.path("case.bin");
        let exported = self.path("refused.bin");
        let mut left_behind = false;
        let (status, printed) = match &case.input {
            Input::File(bytes) => {
                std::fs::write(&file, bytes)?;
                self.call(&["verify", &file])?
            }
            Input::Against(bytes) => {
                std::fs::write(&file, bytes)?;
                let checkpoint = self.checkpoint(&Checkpoint::base()?)?;
                self.call(&["verify", &file, "--against", &checkpoint])?
            }
            Input::Checkpoint(change) => {
                let mut checkpoint = Checkpoint::base()?;
                change(&mut checkpoint);
                let checkpoint = self.checkpoint(&checkpoint)?;
                let result = self.call(&["export", "--src", &checkpoint, "--dst", &exported])?;
                left_behind = std::fs::remove_file(&exported).is_ok();
                result
            }
        };
        // A SHOULD does not make a file invalid.
        let wanted: &[i32] = match (&case.input, case.rule.level()) {
            (Input::Checkpoint(_), _) => &[1, 2, 3, 101],
            (_, Level::Note) => &[0],
            _ => &[1],
        };
        let range = format!("{}..{}", case.range.start, case.range.end);
        let names_rule = printed.contains(case.rule.id());
        let names_place =
            if case.range.is_empty() { printed.contains(&case.field) } else { printed.contains(&range) };
        let right = status.is_some_and(|status| wanted.contains(&status)) && !left_behind;
        let (mark, remark) = match (right, names_rule && names_place) {
            (true, true) => (Mark::Exact, String::new()),
            (true, false) => (Mark::Verdict, format!("does not name {} at {range}", case.rule)),
            (false, _) if left_behind => (Mark::Failed, "left a file behind".into()),
            (false, _) => (Mark::Failed, format!("exit status {status:?}")),
        };
        Ok(Outcome { case: case.name.clone(), rule: case.rule.id(), mark, remark })
    }
}
