//! The vocabulary comes from the model, never from the network.
//!
//! Each test runs children of this very program whose environment sends every HTTP client to a proxy that counts.

use std::ffi::OsStr;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs, thread};

use engine::harmony::{CACHE_VARIABLE, Encoding, FOLDER_VARIABLE, private_cache};
use formats::vocabulary::Vocabulary;
use openai_harmony::{HarmonyEncodingName, load_harmony_encoding};

const TASK: &str = "HARMONY_TEST_TASK";

#[test]
#[ignore = "what the children of the other tests do"]
fn child() {
    let outcome = match env::var(TASK).as_deref() {
        Ok("ours") => Encoding::new(Vocabulary::o200k()).map(|_| String::new()).map_err(|it| it.to_string()),
        Ok("upstream") => load_harmony_encoding(HarmonyEncodingName::HarmonyGptOss)
            .map(|_| String::new())
            .map_err(|it| it.to_string()),
        _ => Ok(format!("{:?}", private_cache())),
    };
    println!("\noutcome: {outcome:?}");
}

/// A proxy that takes connections, counts them and closes them.
struct Proxy {
    address: String,
    connections: Arc<AtomicUsize>,
}

impl Proxy {
    fn new() -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let connections = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&connections);
        thread::spawn(move || {
            for connection in listener.incoming() {
                counter.fetch_add(1, Ordering::SeqCst);
                drop(connection);
            }
        });
        Proxy { address, connections }
    }

    /// Runs a child and returns its outcome, with the connections that it made.
    fn run(&self, task: &str, variables: &[(&str, &OsStr)]) -> (String, usize) {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--ignored", "--exact", "network::child", "--nocapture"]).env(TASK, task);
        for name in [FOLDER_VARIABLE, CACHE_VARIABLE, "NO_PROXY", "no_proxy"] {
            command.env_remove(name);
        }
        for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"] {
            command.env(name, &self.address);
        }
        command.envs(variables.iter().copied());
        let before = self.connections.load(Ordering::SeqCst);
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let outcome = text.lines().find_map(|line| line.strip_prefix("outcome: "));
        let outcome = outcome.unwrap_or_else(|| panic!("{output:?}")).to_owned();
        (outcome, self.connections.load(Ordering::SeqCst) - before)
    }
}

fn content() -> Vec<u8> {
    Vocabulary::o200k().tiktoken_bytes().unwrap()
}

fn names(folder: &Path) -> Vec<String> {
    fs::read_dir(folder).unwrap().map(|it| it.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn the_proxy_sees_what_upstream_does() {
    let cache = tempfile::tempdir().unwrap();
    let (outcome, connections) = Proxy::new().run("upstream", &[(CACHE_VARIABLE, cache.path().as_os_str())]);
    assert!(outcome.starts_with("Err"), "{outcome}");
    assert!(connections > 0);
}

#[test]
fn the_cache_is_filled_and_repaired_without_the_network() {
    let cache = tempfile::tempdir().unwrap();
    let folder = cache.path().join("not there yet");
    let proxy = Proxy::new();
    let variables = [(CACHE_VARIABLE, folder.as_os_str())];
    assert_eq!(proxy.run("ours", &variables), ("Ok(\"\")".into(), 0));
    let names = names(&folder);
    assert_eq!(names.len(), 1, "{names:?}");
    let file = folder.join(&names[0]);
    assert!(fs::read(&file).unwrap() == content());
    for stale in [b"AA== 0\n".to_vec(), vec![b'A'; content().len()], Vec::new()] {
        fs::write(&file, stale).unwrap();
        assert_eq!(proxy.run("ours", &variables), ("Ok(\"\")".into(), 0));
        assert!(fs::read(&file).unwrap() == content());
    }
}

#[test]
fn without_variables_the_temporary_folder_serves() {
    let temporary = tempfile::tempdir().unwrap();
    let variables = ["TMPDIR", "TMP", "TEMP"].map(|name| (name, temporary.path().as_os_str()));
    assert_eq!(Proxy::new().run("ours", &variables), ("Ok(\"\")".into(), 0));
    assert_eq!(names(temporary.path()), ["tiktoken-rs-cache"]);
}

#[test]
fn another_file_in_the_named_folder_is_an_error_and_stays() {
    let named = tempfile::tempdir().unwrap();
    let proxy = Proxy::new();
    let variables = [(FOLDER_VARIABLE, named.path().as_os_str())];
    assert_eq!(proxy.run("ours", &variables), ("Ok(\"\")".into(), 0));
    let file = named.path().join("o200k_base.tiktoken");
    assert!(fs::read(&file).unwrap() == content());
    let mut other = content();
    *other.last_mut().unwrap() = b' ';
    fs::write(&file, &other).unwrap();
    let (outcome, connections) = proxy.run("ours", &variables);
    assert!(outcome.starts_with("Err") && outcome.contains("not the vocabulary o200k"), "{outcome}");
    assert!(outcome.contains(FOLDER_VARIABLE), "{outcome}");
    assert_eq!(connections, 0);
    assert!(fs::read(&file).unwrap() == other);
}

#[test]
fn a_place_that_cannot_be_written_to_is_an_error() {
    let place = tempfile::NamedTempFile::new().unwrap();
    let proxy = Proxy::new();
    for name in [CACHE_VARIABLE, FOLDER_VARIABLE] {
        let (outcome, connections) = proxy.run("ours", &[(name, place.path().as_os_str())]);
        assert!(
            outcome.starts_with("Err") && outcome.contains("a folder that you may write to"),
            "{outcome}"
        );
        assert_eq!(connections, 0);
    }
    let (outcome, connections) = proxy.run("ours", &[(FOLDER_VARIABLE, OsStr::new(""))]);
    assert!(outcome.starts_with("Err") && outcome.contains("is empty"), "{outcome}");
    assert_eq!(connections, 0);
}

#[test]
#[cfg(target_os = "linux")]
fn the_private_cache_is_the_users_own() {
    let home = tempfile::tempdir().unwrap();
    let proxy = Proxy::new();
    let unset = OsStr::new("");
    let (outcome, _) = proxy.run("private", &[("HOME", home.path().as_os_str()), ("XDG_CACHE_HOME", unset)]);
    assert!(outcome.contains(CACHE_VARIABLE) && outcome.contains(".cache/burn-extended"), "{outcome}");
    assert!(home.path().join(".cache/burn-extended").is_dir());
    let (outcome, _) = proxy.run("private", &[(CACHE_VARIABLE, home.path().as_os_str())]);
    assert_eq!(outcome, "Ok(\"None\")");
    let (outcome, _) = proxy.run("private", &[("HOME", unset), ("XDG_CACHE_HOME", unset)]);
    assert_eq!(outcome, "Ok(\"None\")");
}
