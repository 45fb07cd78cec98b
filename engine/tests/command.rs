//! The command `gptoss` as a person or a program meets it: exit status, output, what is left on disk.
//!
//! Most tests run a model whose next token follows from the last one alone ([`chain`]): what it says is known without
//! any reference. The numbers are compared with the traces of the genuine module in `fixtures/gpt-oss`.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use engine::backend::Backend;
use engine::gpt_oss::{LoadOptions, Model};
use formats::model_bin::{Stored, StoredOptions};
use formats::output::OutputFolder;
use formats::tokenizer::Tokenizer;
use formats::vocabulary::Vocabulary;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

const VERBS: [&str; 19] = [
    "demo",
    "chat",
    "generate",
    "parity",
    "logits",
    "bench",
    "selftest",
    "info",
    "export",
    "verify",
    "inspect",
    "dump",
    "diff",
    "unpack",
    "convert",
    "digest",
    "tokenize",
    "completions",
    "man",
];

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gptoss"));
    // What the command caches stays in the target folder.
    command.args(arguments).env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR")).env("RUST_BACKTRACE", "0");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn gptoss(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

/// Runs with a standard input.
fn piped(arguments: &[&str], input: &str) -> Output {
    let mut child = command(arguments).stdin(Stdio::piped()).spawn().unwrap();
    // It may end before it has read everything.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Expects an exit status; standard output and standard error.
#[track_caller]
fn ended(status: i32, output: &Output) -> (String, String) {
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(status), "{out}{err}");
    (out, err)
}

#[track_caller]
fn expect(status: i32, arguments: &[&str]) -> String {
    ended(status, &gptoss(arguments)).0
}

#[track_caller]
fn json_of(status: i32, arguments: &[&str]) -> Value {
    serde_json::from_str(&expect(status, arguments)).unwrap()
}

/// Every line of a text as JSON.
#[track_caller]
fn json_lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

fn fixture(path: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(path).display().to_string()
}

/// A checkpoint of the genuine traces.
fn small() -> String {
    fixture("gpt-oss/checkpoints/two-blocks")
}

fn trace() -> String {
    fixture("gpt-oss/traces/two-blocks.safetensors")
}

struct Workplace(TempDir);

impl Workplace {
    fn new() -> Workplace {
        Workplace(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    fn write(&self, name: &str, content: &str) -> String {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// The names of everything in it, hidden files included.
    fn entries(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// Width of the residual stream of [`chain`], which has room for as many tokens.
const HIDDEN: usize = 32;
/// Embedding rows of the released checkpoints.
const ROWS: usize = 201_088;

/// A checkpoint with the o200k vocabulary in which each token of a text is followed by the next one, with certainty.
///
/// Token number k of all texts has the k-th unit vector as its embedding; its successor has it as its unembedding, times
/// 8, so that its logit is 8 √32 ahead of all others. Attention and experts add nothing.
fn chain(name: &str, texts: &[&str]) -> String {
    static WRITING: Mutex<()> = Mutex::new(());
    let _guard = WRITING.lock().unwrap();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("chain-1-{name}"));
    if !folder.exists() {
        write_chain(&folder, texts);
    }
    folder.display().to_string()
}

fn write_chain(folder: &Path, texts: &[&str]) {
    let tokenizer = Tokenizer::new(Vocabulary::o200k()).unwrap();
    let texts: Vec<Vec<u32>> =
        texts.iter().map(|text| tokenizer.encode_with_special(text).unwrap()).collect();
    let mut known: Vec<u32> = texts.concat();
    known.sort_unstable();
    known.dedup();
    assert!(known.len() <= HIDDEN, "{} tokens", known.len());
    let place = |token: u32| known.binary_search(&token).unwrap();
    let [mut embedding, mut unembedding] = [(); 2].map(|()| vec![0.0; ROWS * HIDDEN]);
    for &token in &known {
        embedding[token as usize * HIDDEN + place(token)] = 1.0;
    }
    for pair in texts.iter().flat_map(|text| text.windows(2)) {
        unembedding[pair[1] as usize * HIDDEN + place(pair[0])] = 8.0;
    }
    // One head, four experts of width 32.
    let (qkv, joined, experts, mlp) = (3 * 64, 64, 4, 32);
    let bf16 = |values: &[f32]| -> Vec<u8> {
        values.iter().flat_map(|&value| half::bf16::from_f32(value).to_le_bytes()).collect()
    };
    let zeros = |shape: &[usize]| (Dtype::BF16, shape.to_vec(), bf16(&vec![0.0; shape.iter().product()]));
    let bytes = |shape: &[usize], byte: u8| (Dtype::U8, shape.to_vec(), vec![byte; shape.iter().product()]);
    let ones = || (Dtype::BF16, vec![HIDDEN], bf16(&[1.0; HIDDEN]));
    let tensors = [
        ("embedding.weight", (Dtype::BF16, vec![ROWS, HIDDEN], bf16(&embedding))),
        ("block.0.attn.norm.scale", ones()),
        ("block.0.attn.qkv.weight", zeros(&[qkv, HIDDEN])),
        ("block.0.attn.qkv.bias", zeros(&[qkv])),
        ("block.0.attn.sinks", zeros(&[1])),
        ("block.0.attn.out.weight", zeros(&[HIDDEN, joined])),
        ("block.0.attn.out.bias", zeros(&[HIDDEN])),
        ("block.0.mlp.norm.scale", ones()),
        ("block.0.mlp.gate.weight", zeros(&[experts, HIDDEN])),
        ("block.0.mlp.gate.bias", zeros(&[experts])),
        ("block.0.mlp.mlp1_weight.blocks", bytes(&[experts, 2 * mlp, HIDDEN / 32, 16], 0)),
        ("block.0.mlp.mlp1_weight.scales", bytes(&[experts, 2 * mlp, HIDDEN / 32], 127)),
        ("block.0.mlp.mlp1_bias", zeros(&[experts, 2 * mlp])),
        ("block.0.mlp.mlp2_weight.blocks", bytes(&[experts, HIDDEN, mlp / 32, 16], 0)),
        ("block.0.mlp.mlp2_weight.scales", bytes(&[experts, HIDDEN, mlp / 32], 127)),
        ("block.0.mlp.mlp2_bias", zeros(&[experts, HIDDEN])),
        ("norm.scale", ones()),
        ("unembedding.weight", (Dtype::BF16, vec![ROWS, HIDDEN], bf16(&unembedding))),
    ];
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    let config = json!({
        "num_hidden_layers": 1, "num_experts": experts, "experts_per_token": 4, "vocab_size": ROWS,
        "hidden_size": HIDDEN, "intermediate_size": mlp, "swiglu_limit": 7.0, "head_dim": 64,
        "num_attention_heads": 1, "num_key_value_heads": 1, "sliding_window": 16, "initial_context_length": 4096,
        "rope_theta": 150000, "rope_scaling_factor": 32.0, "rope_ntk_alpha": 1, "rope_ntk_beta": 32,
    });
    let output = OutputFolder::create(folder).unwrap();
    safetensors::serialize_to_file(views, None, &output.path().join("model.safetensors")).unwrap();
    fs::write(output.path().join("config.json"), config.to_string()).unwrap();
    output.finish().unwrap();
}

/// A model that says "Hello, world." to everything.
fn answering() -> String {
    chain("answer", &["assistant<|channel|>final<|message|>Hello, world.<|return|>"])
}

/// A model that never stops thinking.
fn endless() -> String {
    chain("endless", &["assistant<|channel|>analysis<|message|>one two", " two three four", " four two"])
}

/// A model that calls a tool whatever it hears.
fn calling() -> String {
    let call = "assistant<|channel|>commentary to=functions.get_price <|constrain|>json<|message|>{\"item\":\"tea\"}<|call|>";
    chain("call", &[call])
}

#[test]
fn every_verb_has_help_and_is_on_the_pages() {
    for page in [
        &["--help"][..],
        &["man"],
        &["completions", "bash"],
        &["completions", "zsh"],
        &["completions", "fish"],
    ] {
        let text = expect(0, page);
        for verb in VERBS {
            assert!(text.contains(verb), "{verb} in {page:?}");
        }
    }
    for verb in VERBS {
        let text = expect(0, &[verb, "--help"]);
        assert!(text.contains(&format!("Usage: gptoss {verb}")), "{text}");
        assert!(!text.contains("modelbin"), "{text}");
    }
    assert!(expect(0, &["completions", "bash"]).contains("_gptoss"));
}

#[test]
fn what_cannot_run_exits_with_2_and_names_the_flag() {
    let place = Workplace::new();
    let absent = place.path("absent");
    expect(2, &["no-such-verb"]);
    expect(2, &["generate"]);
    expect(2, &["info", "--model", &absent]);
    let small = small();
    let part = format!("{small}/model.safetensors");
    let cases: [(&[&str], &str); 11] = [
        (&["generate"], "--conversation"),
        (&["info", "-m", &part], &format!("name its folder, {small}")),
        (&["chat", "--seed", "-1"], "--seed"),
        (&["generate", "-m", &small, "--plain", "-p", "x", "--memory", "1KiB"], "--memory"),
        (&["generate", "-m", &small, "--plain", "-p", "x", "--context", "999999999"], "context"),
        (&["generate", "-m", &small, "--plain", "-p", ""], "--prompt"),
        (&["generate", "-m", &small, "--plain", "-p", "x", "--top-p", "2"], "top_p"),
        (&["generate", "-m", &small, "--plain", "-p", "x", "--greedy", "--temperature", "0.5"], "--greedy"),
        (&["generate", "-m", &small, "-p", "x"], "generate --plain"),
        (&["chat", "-m", &small], "generate --plain"),
        (&["parity", "-m", &small, "--other-dequantize"], "--tokens"),
    ];
    for (arguments, needed) in cases {
        let (_, err) = ended(2, &gptoss(arguments));
        assert!(err.contains(needed), "{arguments:?}: {err}");
    }
    if !Backend::Cuda.is_compiled() {
        let (_, err) = ended(2, &gptoss(&["selftest", "--backend", "cuda"]));
        assert!(err.contains("--features cuda") && err.contains("--backend cpu"), "{err}");
    }
}

#[test]
fn format_verbs_are_those_of_modelbin_under_another_name() {
    let place = Workplace::new();
    let file = place.path("model.bin");
    expect(0, &["export", "-s", &fixture("checkpoints/hf"), "-d", &file, "-q"]);
    let document = json_of(0, &["verify", &file, "--json", "-q"]);
    assert_eq!(document["valid"], true);
    expect(0, &["diff", &file, &fixture("checkpoints/original"), "-q"]);
    let mut bytes = fs::read(&file).unwrap();
    bytes[48..52].copy_from_slice(&33u32.to_le_bytes());
    fs::write(&file, bytes).unwrap();
    let document = json_of(1, &["verify", &file, "--json"]);
    assert_eq!(document["violations"][0]["rule"], "HDR-EMBEDDING-DIM");
    // The engine's verbs refuse it with the same list and the same status.
    let document = json_of(1, &["info", "-m", &file, "--json", "-q"]);
    assert_eq!(document["violations"][0]["rule"], "HDR-EMBEDDING-DIM");
    let (_, err) = ended(2, &gptoss(&["export", "-s", &file, "-d", &place.path("other.bin")]));
    assert!(err.starts_with("gptoss: ") && err.contains("`gptoss convert`"), "{err}");
    assert_eq!(place.entries(), ["model.bin"]);
}

#[test]
fn generate_says_what_the_model_says() {
    let model = answering();
    assert_eq!(expect(0, &["generate", "-m", &model, "-p", "Hi", "-q"]), "[final] Hello, world.\n");
    let final_only = &["generate", "-m", &model, "-p", "Hi", "-q", "--final-only"];
    assert_eq!(expect(0, final_only), "Hello, world.\n");
    // A prompt on standard input, and statistics on standard error.
    let output = piped(&["generate", "-m", &model, "-p", "-"], "Hi");
    let (out, err) = ended(0, &output);
    assert_eq!(out, "[final] Hello, world.\n");
    assert!(err.contains("experts (MXFP4, packed)") && err.contains("8 tokens"), "{err}");
}

#[test]
fn generate_goes_on_from_a_conversation() {
    let place = Workplace::new();
    let conversation = json!({ "messages": [
        { "role": "system", "content": "You are a test." },
        { "role": "user", "content": "Hi" },
        { "role": "assistant", "channel": "analysis", "content": "Hm." },
        { "role": "assistant", "channel": "final", "content": "Hello." },
        { "role": "user", "content": "Again" },
    ] });
    let file = place.write("conversation.json", &conversation.to_string());
    let model = answering();
    let arguments = ["generate", "-m", &model, "--conversation", &file, "--json", "-q"];
    let events = json_lines(&expect(0, &arguments));
    // By hand, of Harmony's documentation: the analysis of an answered question is left out.
    let prompt = "<|start|>system<|message|>You are a test.<|end|><|start|>user<|message|>Hi<|end|>\
                  <|start|>assistant<|channel|>final<|message|>Hello.<|end|>\
                  <|start|>user<|message|>Again<|end|><|start|>assistant";
    let tokenizer = Tokenizer::new(Vocabulary::o200k()).unwrap();
    let done = events.last().unwrap();
    assert_eq!(done["prompt"], tokenizer.encode_with_special(prompt).unwrap().len());
    let broken = place.write("broken.json", "{\"messages\": [{\"role\": \"nobody\"}]}");
    let (_, err) = ended(2, &gptoss(&["generate", "-m", &model, "--conversation", &broken, "-q"]));
    assert!(err.contains("broken.json") && err.contains("Harmony conversation"), "{err}");
}

#[test]
fn events_are_json_lines() {
    let model = answering();
    let arguments = ["generate", "-m", &model, "-p", "Hi", "-q", "--json", "--logprobs", "2"];
    let events = json_lines(&expect(0, &arguments));
    let kinds = |wanted: &str| events.iter().filter(|event| event["event"] == wanted).collect::<Vec<_>>();
    let tokens: Vec<u64> = kinds("token").iter().map(|event| event["token"].as_u64().unwrap()).collect();
    assert_eq!(tokens, [200005, 17196, 200008, 13225, 11, 2375, 13, 200002]);
    let deltas: String = kinds("delta").iter().map(|event| event["text"].as_str().unwrap()).collect();
    assert_eq!(deltas, "Hello, world.");
    assert_eq!(kinds("start")[0]["channel"], "final");
    assert_eq!(kinds("end")[0]["ending"], "return");
    let done = events.last().unwrap();
    assert_eq!((&done["event"], &done["generated"]), (&"done".into(), &8.into()));
    assert_eq!(done["stop"], json!({ "token": 200002 }));
    for event in kinds("token") {
        // The next token is certain: e^(−8 √32) for each of the others.
        assert!(event["logprob"].as_f64().unwrap().abs() < 1e-6, "{event}");
        let top = event["top_logprobs"].as_array().unwrap();
        assert_eq!((top.len(), &top[0]["token"]), (2, &event["token"]));
    }
    // An error is a line, too.
    let small = small();
    let output = gptoss(&["generate", "-m", &small, "-p", "x", "--json", "-q"]);
    let (out, _) = ended(2, &output);
    assert!(json_lines(&out)[0]["error"].as_str().unwrap().contains("--plain"), "{out}");
}

#[test]
fn a_text_ends_where_it_shall() {
    let model = endless();
    let generate = |flags: &[&str]| {
        let arguments = [&["generate", "-m", &model, "-p", "Hi", "--json", "-q"], flags].concat();
        let events = json_lines(&expect(0, &arguments));
        let deltas = events.iter().filter(|event| event["event"] == "delta");
        let text: String = deltas.map(|event| event["text"].as_str().unwrap()).collect();
        (text, events.last().unwrap()["stop"].clone())
    };
    assert_eq!(generate(&["--max-tokens", "6"]), ("one two three".into(), "max_tokens".into()));
    assert_eq!(generate(&["--stop", "three fo"]), ("one two ".into(), Value::Null));
    let (text, stop) = generate(&["--context", "72", "--stop", "no such text"]);
    assert!(text.starts_with("one two three four two three four"), "{text}");
    assert_eq!(stop, "context_full");
    // A special token by its name; a ban; a bias that overrules the model.
    let (text, stop) = generate(&["--stop", "<|message|>"]);
    assert_eq!((text.as_str(), stop), ("", json!({ "token": 200008 })));
    let (text, _) = generate(&["--max-tokens", "5", "--logit-bias", "13225=100"]);
    assert_eq!(text, "HelloHelloHelloHelloHello");
    // In a chat, what was not shown was not said.
    let place = Workplace::new();
    let saved = place.path("saved.json");
    let script = format!("Hi\n/save {saved}\n");
    let (out, _) = ended(0, &piped(&["chat", "-m", &answering(), "-q", "--stop", "llo, w"], &script));
    assert!(out.starts_with("[final] He\n"), "{out}");
    let conversation: Value = serde_json::from_str(&fs::read_to_string(&saved).unwrap()).unwrap();
    let answer = conversation["messages"].as_array().unwrap().last().unwrap();
    assert_eq!((&answer["channel"], &answer["content"]), (&json!("final"), &json!("He")), "{answer}");
}

#[test]
fn a_conversation_that_is_too_long_is_an_error_with_advice() {
    let model = answering();
    let (out, err) =
        ended(2, &piped(&["chat", "-m", &model, "-q", "--context", "70"], "Hi\nAnd you?\n/reset\nHi\n"));
    assert!(
        out.contains("--context allows more, /undo and /reset") && out.ends_with("Hello, world.\n"),
        "{out}{err}"
    );
    // The progress of a long prompt, and the limit of the model itself.
    let long = "word ".repeat(2500);
    let (out, err) =
        ended(0, &gptoss(&["generate", "-m", &model, "--plain", "-p", &long, "--max-tokens", "1"]));
    assert!(out.len() < 100 && err.contains("prompt: 250"), "{out}{err}");
    let events =
        expect(0, &["generate", "-m", &model, "--plain", "-p", &long, "--max-tokens", "1", "--json"]);
    let done: Vec<_> = json_lines(&events).iter().filter_map(|event| event["done"].as_u64()).collect();
    assert_eq!(done, (0..2500).step_by(256).collect::<Vec<u64>>());
}

#[test]
fn seeds_choose_the_text() {
    let small = small();
    let generate = |seed: &str| {
        let flags = ["--plain", "-p", "hello", "--max-tokens", "24", "--seed", seed, "--json", "-q"];
        let events = json_lines(&expect(0, &[&["generate", "-m", &small], &flags[..]].concat()));
        events.iter().filter_map(|event| event["token"].as_u64()).collect::<Vec<u64>>()
    };
    let [first, again, other] = ["1", "1", "2"].map(generate);
    assert_eq!(first.len(), 24);
    assert_eq!(first, again);
    assert_ne!(first, other);
}

#[test]
fn a_chat_through_a_pipe() {
    let place = Workplace::new();
    let model = answering();
    let saved = place.path("saved.json");
    let script = format!(
        "Hi\n/reasoning high\n/developer Be brief.\nAnd you?\n/undo\n/save {saved}\n/reset\n/load {saved}\n/stats\n\
         a line that \\\ngoes on\n/raw\nraw\n/quit\nnever read\n"
    );
    let (out, err) = ended(0, &piped(&["chat", "-m", &model], &script));
    let wanted = [
        "[final] Hello, world.",
        "reasoning effort: high",
        "the developer message has changed",
        "[final] Hello, world.",
        "taken back",
        &format!("{saved}: 4 messages"),
        "forgotten",
        &format!("{saved}: 4 messages"),
    ];
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[..wanted.len()], wanted, "{out}");
    assert!(out.contains("4 messages; ") && out.contains("tokens/s on "), "{out}");
    assert!(out.ends_with("<|channel|>final<|message|>Hello, world.<|return|>\n"), "{out}");
    // The statistics of each turn: tokens per second, reused and prefilled.
    assert_eq!(err.matches("tokens/s; prompt of ").count(), 4, "{err}");
    let conversation: Value = serde_json::from_str(&fs::read_to_string(&saved).unwrap()).unwrap();
    let roles: Vec<&str> =
        conversation["messages"].as_array().unwrap().iter().map(|it| it["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["system", "developer", "user", "assistant"]);
    assert_eq!(conversation["messages"][0]["content"][0]["reasoning_effort"], "High");
    assert_eq!(place.entries(), ["saved.json"]);
}

#[test]
fn the_next_turn_prefills_what_is_new_alone() {
    let model = answering();
    let (out, _) = ended(0, &piped(&["chat", "-m", &model, "--json", "-q"], "Hi\nAnd you?\n/retry\n"));
    let events = json_lines(&out);
    let done: Vec<&Value> = events.iter().filter(|event| event["event"] == "done").collect();
    let number = |turn: usize, key: &str| done[turn][key].as_u64().unwrap();
    assert_eq!((number(0, "reused"), number(0, "prefilled")), (0, number(0, "prompt")));
    // Prompt and answer of the first turn, the token that ended it aside.
    assert_eq!(number(1, "reused"), number(0, "prompt") + 7);
    assert_eq!(number(1, "reused") + number(1, "recomputed") + number(1, "prefilled"), number(1, "prompt"));
    assert_eq!(number(2, "prompt"), number(1, "prompt"));
    // Asked again, nothing of it is computed again.
    assert_eq!((number(2, "reused"), number(2, "prefilled")), (number(1, "prompt"), 0));
}

#[test]
fn mistakes_do_not_end_a_chat_but_a_script_notices() {
    let model = answering();
    let script = "/nonsense\n/load /no/such/file\n/reasoning some\n/system\n/tools {}\n/retry\nHi\n";
    let (out, err) = ended(2, &piped(&["chat", "-m", &model, "-q"], script));
    for needed in ["/nonsense is no command", "/no/such/file", "low, medium or high", "/system: ", "/retry: "]
    {
        assert!(out.contains(needed), "{needed} in {out}");
    }
    assert!(out.ends_with("[final] Hello, world.\n"), "{out}");
    assert!(err.contains("not everything worked"), "{err}");
}

#[test]
fn tools_are_run_or_asked_for() {
    let place = Workplace::new();
    let model = calling();
    let tools = json!([{ "type": "function", "function": {
        "name": "get_price", "description": "Gets a price.",
        "parameters": { "type": "object", "properties": { "item": { "type": "string" } } },
    } }]);
    let file = place.write("tools.json", &tools.to_string());
    // The user answers the calls as long as there are lines.
    let chat_with = |tools| ["chat", "-m", &model, "-q", "--tools", tools];
    let (out, _) =
        ended(0, &piped(&chat_with(&file), "What is the price of tea?\n{\"price\": 3}\n{\"price\": 4}\n"));
    let call = "[call functions.get_price] {\"item\":\"tea\"}\n";
    let result = |price: u32| format!("[result functions.get_price] {{\"price\": {price}}}\n");
    let wanted = [call, &result(3), call, &result(4), call, "taken back; /retry asks again\n"].concat();
    assert_eq!(out, wanted);
    // The built-in tool runs; a model that calls it for ever is stopped.
    let chat = ["chat", "-m", &model, "-q", "--tools", "demo", "--json"];
    let (out, _) = ended(2, &piped(&chat, "What is the price of tea?\n"));
    let events = json_lines(&out);
    let results: Vec<&Value> = events.iter().filter(|event| event["event"] == "result").collect();
    assert!(results.len() > 3, "{out}");
    assert_eq!(results[0]["output"], "{\"price\": 11}");
    let error = events.iter().find(|event| event["event"] == "error").unwrap();
    assert!(error["error"].as_str().unwrap().contains("tool calls"), "{out}");
    // `generate` leaves the call to whoever reads it.
    let output = gptoss(&["generate", "-m", &model, "-p", "tea?", "-q", "--tools", &file]);
    assert_eq!(ended(0, &output).0, call);
    // ... and says so where it was asked for nothing but an answer.
    let (out, err) =
        ended(2, &gptoss(&["generate", "-m", &model, "-p", "x", "-q", "--tools", &file, "--final-only"]));
    assert!(out.is_empty() && err.contains("functions.get_price was called"), "{out}{err}");
    let unfit = tools.to_string().replace("get_price", "get price");
    let unfit = place.write("unfit.json", &unfit);
    let (_, err) = ended(2, &gptoss(&["generate", "-m", &model, "-p", "x", "-q", "--tools", &unfit]));
    assert!(err.contains("--tools") && err.contains("a function named \"get price\""), "{err}");
    // A chat keeps the tools that it had.
    let script = format!("/tools {unfit}\nWhat is the price of tea?\n{{\"price\": 3}}\n");
    let (out, _) = ended(2, &piped(&chat_with(&file), &script));
    assert!(out.contains("letters, digits, _ and -") && out.contains(&result(3)), "{out}");
    let broken = place.write("broken.json", "{}");
    let (_, err) = ended(2, &gptoss(&["generate", "-m", &model, "-p", "x", "-q", "--tools", &broken]));
    assert!(err.contains("needed a list of functions"), "{err}");
}

#[test]
fn logits_are_those_of_the_library() {
    let place = Workplace::new();
    let tokens: [u32; 5] = [3, 141, 59, 26, 283];
    let ids = place.write("ids.json", &json!(tokens).to_string());
    let target = place.path("logits.safetensors");
    let document = json_of(0, &["logits", &small(), "--tokens", &ids, "--out", &target, "--json", "-q"]);
    assert_eq!((&document["positions"], &document["vocabulary"]), (&5.into(), &300.into()));
    let stored = Stored::open(small().as_ref(), &StoredOptions::default(), &()).unwrap();
    let model = Model::load(&stored, &LoadOptions::default(), &Backend::Cpu.open().unwrap(), &()).unwrap();
    let mut wanted = Vec::new();
    model
        .logits(&tokens, |_, rows| -> engine::Result<()> {
            wanted.extend(rows.iter().flat_map(|value| value.to_le_bytes()));
            Ok(())
        })
        .unwrap();
    let bytes = fs::read(&target).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.names(), ["logits"]);
    let logits = file.tensor("logits").unwrap();
    assert_eq!((logits.dtype(), logits.shape()), (Dtype::F32, &[5, 300][..]));
    assert!(logits.data() == wanted);
    assert_eq!(place.entries(), ["ids.json", "logits.safetensors"]);
}

#[test]
fn a_refused_computation_leaves_the_old_file_alone() {
    let place = Workplace::new();
    let target = place.write("logits.safetensors", "an earlier file");
    for ids in ["[1, 2, 300]", "[]", "[1, -2]", "{\"a\": 1}", "no JSON"] {
        let file = place.write("ids.json", ids);
        expect(2, &["logits", &small(), "--tokens", &file, "--out", &target, "-q"]);
        assert_eq!(fs::read_to_string(&target).unwrap(), "an earlier file");
        assert_eq!(place.entries(), ["ids.json", "logits.safetensors"]);
    }
}

#[test]
fn parity_with_the_genuine_module() {
    let (small, trace) = (small(), trace());
    let bounds = ["--max-rel", "1e-4", "--min-top1", "1", "--max-kl", "1e-6"];
    let compare = |status, flags: &[&str]| {
        json_of(status, &[&["parity", "-m", &small, "--json", "-q"], flags].concat())
    };
    let found = compare(0, &[&["--reference", &trace, "--cache", "f32"], &bounds[..]].concat());
    assert_eq!(found["summary"]["positions"], 40);
    assert_eq!(found["positions"].as_array().unwrap().len(), 40);
    assert_eq!(found["failures"], json!([]));
    // Half precision is worse than that, and is told so.
    let half = ["--reference", &trace, "--activations", "bf16", "--weights", "bf16"];
    let found = compare(1, &[&half, &bounds[..]].concat());
    let error = found["summary"]["max_rel"].as_f64().unwrap();
    assert!((1e-4..5e-2).contains(&error), "{error}");
    assert!(found["failures"][0].as_str().unwrap().contains("relative"), "{found}");
    // Decoded experts compute the same; another model does not.
    let text = ["--text", "hello world", "--min-top1", "0.9"];
    let plain = ["--plain-tensors", "--other-dequantize", "--max-rel", "1e-5"];
    compare(0, &[&plain, &text[..]].concat());
    compare(1, &[&["--other", &fixture("gpt-oss/checkpoints/long")], &text[..]].concat());
    // A table for people, which says what it leaves out.
    let table = expect(0, &["parity", "-m", &small, "--reference", &trace, "-q"]);
    assert!(table.contains("16 worst of 40 positions") && table.contains("100.00 %"), "{table}");
}

#[test]
fn parity_refuses_what_cannot_be_compared() {
    let place = Workplace::new();
    let (small, trace) = (small(), trace());
    let ids = place.write("ids.json", "[1, 2, 3]");
    let logits = place.path("logits.safetensors");
    expect(0, &["logits", &small, "--tokens", &ids, "--out", &logits, "-q"]);
    // The file knows its tokens.
    let found = json_of(0, &["parity", "-m", &small, "--reference", &logits, "--json", "-q"]);
    assert_eq!(found["summary"]["max_abs"], 0.0);
    let truncated = place.path("truncated.safetensors");
    let bytes = fs::read(&logits).unwrap();
    fs::write(&truncated, &bytes[..bytes.len() - 1]).unwrap();
    let cases: [&[&str]; 3] =
        [&["--reference", &trace, "--tokens", &ids], &["--reference", &truncated], &["--reference", &ids]];
    for flags in cases {
        expect(2, &[&["parity", "-m", &small, "-q"], flags].concat());
    }
}

#[test]
fn the_processor_can_be_trusted() {
    let document = json_of(0, &["selftest", "--all", "--backend", "cpu", "--json", "-q"]);
    assert_eq!(document["trusted"], true);
    let checks = document["backends"][0]["report"]["checks"].as_array().unwrap();
    assert!(checks.len() >= 4, "{document}");
    for kernel in ["kernel mxfp4", "kernel product"] {
        assert!(checks.iter().any(|check| check["name"].as_str().unwrap().starts_with(kernel)), "{document}");
    }
    for check in checks {
        assert!(check["error"].as_f64().unwrap() <= check["bound"].as_f64().unwrap(), "{check}");
    }
    assert!(expect(0, &["selftest", "--backend", "cpu"]).starts_with("cpu: its numbers can be trusted\n"));
}

#[test]
fn wgpu_agrees_with_the_processor() {
    if let Err(error) = Backend::Wgpu.open() {
        assert!(std::env::var_os("CI").is_none(), "{error}");
        eprintln!("not tested: {error}");
        return;
    }
    let flags = ["--backend", "wgpu", "--cache", "f32", "--other-backend", "cpu", "--text", "hello world"];
    let found =
        json_of(0, &[&["parity", "-m", &small(), "--json", "-q", "--max-rel", "1e-4"], &flags[..]].concat());
    assert_eq!(found["summary"]["top1"], 1.0);
}

#[test]
fn bench_and_info_are_for_programs_too() {
    let small = small();
    let flags = ["--prompt", "8,16", "--batch", "1,3", "--generate", "4", "--runs", "2", "--json", "-q"];
    let document = json_of(0, &[&["bench", "-m", &small], &flags[..]].concat());
    let rows = document["rows"].as_array().unwrap();
    let numbers = |key: &str| rows.iter().map(|row| row[key].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!((numbers("prompt"), numbers("batch")), (vec![8, 8, 16, 16], vec![1, 3, 1, 3]));
    for row in rows {
        assert_eq!(row["decode_tokens_per_second"].as_array().unwrap().len(), 2);
        assert!(
            row["median_decode"].as_f64().unwrap() > 0.0 && row["median_prefill"].as_f64().unwrap() > 0.0
        );
    }
    expect(2, &["bench", "-m", &small, "--runs", "0", "-q"]);
    expect(2, &["bench", "-m", &small, "--batch", "33", "-q"]);
    expect(2, &["bench", "-m", &small, "--prompt", "64", "--context", "32", "-q"]);
    let document = json_of(0, &["info", "-m", &small, "--json", "-q"]);
    assert_eq!(document["model"]["config"]["num_blocks"], 2);
    assert_eq!(document["model"]["chat"], false);
    assert!(document["residency"]["parts"].as_array().unwrap().len() >= 4);
    assert_eq!(document["devices"][0]["backend"], "cpu");
    let text = expect(0, &["info", "-m", &small, "-q"]);
    assert!(text.contains("2 blocks, hidden 64; 8 experts of 32, 4 active"), "{text}");
}

/// Waits for a file whose name ends like this; fails if the process ends before.
#[cfg(unix)]
fn wait_for(place: &Workplace, ending: &str, child: &mut Child) {
    let start = Instant::now();
    while !place.entries().iter().any(|entry| entry.ends_with(ending)) {
        assert!(child.try_wait().unwrap().is_none(), "ended before it could be interrupted");
        assert!(start.elapsed() < Duration::from_secs(120), "nothing happened");
    }
}

#[cfg(unix)]
fn interrupt(child: &Child) {
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
}

/// Interrupts a generation as soon as there is an event; all that it writes.
#[cfg(unix)]
#[track_caller]
fn interrupted_at_its_first_event(mut child: Child) -> Vec<Value> {
    let mut out = child.stdout.take().unwrap();
    let mut first = [0; 1];
    out.read_exact(&mut first).unwrap();
    interrupt(&child);
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    json_lines(&format!("{}{rest}", first[0] as char))
}

#[cfg(unix)]
#[test]
fn an_interrupted_computation_leaves_nothing() {
    let place = Workplace::new();
    let tokens: Vec<u32> = (0..4000).collect();
    let ids = place.write("ids.json", &json!(tokens).to_string());
    let target = place.path("logits.safetensors");
    let mut child =
        command(&["logits", &answering(), "--tokens", &ids, "--out", &target, "-q"]).spawn().unwrap();
    wait_for(&place, ".partial", &mut child);
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(place.entries(), ["ids.json"]);
}

#[cfg(unix)]
#[test]
fn an_interrupted_demo_leaves_nothing() {
    let place = Workplace::new();
    let mut child = command(&["demo"]).env("TMPDIR", place.path("")).spawn().unwrap();
    wait_for(&place, ".partial", &mut child);
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(place.entries().is_empty(), "{:?}", place.entries());
}

#[cfg(unix)]
#[test]
fn an_interrupted_generation_keeps_what_was_said() {
    let child = command(&["generate", "-m", &endless(), "-p", "Hi", "--json", "-q"]).spawn().unwrap();
    let events = interrupted_at_its_first_event(child);
    assert_eq!(events.last().unwrap()["stop"], "cancelled");
}

#[cfg(unix)]
#[test]
fn a_prompt_that_takes_too_long_can_be_interrupted() {
    let arguments = ["generate", "-m", &answering(), "--plain", "-p", "-", "--json", "-q"];
    let mut child = command(&arguments).stdin(Stdio::piped()).spawn().unwrap();
    let prompt = " word".repeat(100_000);
    child.stdin.take().unwrap().write_all(prompt.as_bytes()).unwrap();
    let events = interrupted_at_its_first_event(child);
    assert!(events[..events.len() - 1].iter().all(|event| event["event"] == "prefill"), "{events:?}");
    assert!(events.len() < 150, "{} of 196 steps", events.len() - 1);
    let done = events.last().unwrap();
    assert_eq!((&done["stop"], &done["generated"]), (&json!("cancelled"), &json!(0)));
}

#[test]
fn a_reader_that_stops_is_no_error() {
    let mut child = command(&["generate", "-m", &endless(), "-p", "Hi", "--json", "-q"]).spawn().unwrap();
    let mut first = [0; 10];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let (_, err) = ended(0, &child.wait_with_output().unwrap());
    assert!(err.is_empty(), "{err}");
}

#[test]
fn a_damaged_cache_is_made_again() {
    let place = Workplace::new();
    let run = || {
        let output = command(&["info", "--json", "-q"]).env("XDG_CACHE_HOME", place.path("cache")).output();
        let document: Value = serde_json::from_str(&ended(0, &output.unwrap()).0).unwrap();
        document["model"].clone()
    };
    let found = run();
    let versions = fs::read_dir(place.path("cache/burn-extended/demo")).unwrap();
    let file = versions.map(|entry| entry.unwrap().path().join("model.bin")).next().unwrap();
    let bytes = fs::read(&file).unwrap();
    for damaged in [&bytes[..bytes.len() / 2], b"", &[&bytes[..5000], &[0xff; 16], &bytes[5016..]].concat()] {
        fs::write(&file, damaged).unwrap();
        assert_eq!(run(), found);
        assert!(fs::read(&file).unwrap() == bytes);
    }
    // A cache that cannot be had.
    fs::write(place.path("file"), "").unwrap();
    let output = command(&["info", "-q"]).env("XDG_CACHE_HOME", place.path("file")).output().unwrap();
    assert!(ended(2, &output).1.contains("XDG_CACHE_HOME"));
}

#[test]
fn the_demo_has_events() {
    let events = json_lines(&expect(0, &["demo", "--json", "-q"]));
    let of = |kind: &str| events.iter().filter(|event| event["event"] == kind).collect::<Vec<_>>();
    assert_eq!(of("step").len(), 3);
    assert!(events.iter().any(|event| event["valid"] == true), "{events:?}");
    let (verdicts, summary) = (of("verdict"), of("summary")[0]);
    assert!(verdicts.iter().all(|verdict| verdict["right"] == true), "{verdicts:?}");
    assert_eq!((verdicts.len(), of("question").len()), (14, 14));
    assert_eq!((summary["right"].as_u64(), summary["wrong"].as_u64()), (Some(14), Some(0)));
}

#[test]
fn the_demo_is_right_and_keeps_its_files_where_asked() {
    let place = Workplace::new();
    let folder = place.path("demo");
    let (out, err) = ended(0, &gptoss(&["demo", "-d", &folder]));
    assert!(out.contains("$ gptoss export -s checkpoint -d model.bin\n"), "{out}");
    let (right, rest) = out.rsplit_once(" answers are right").unwrap().0.rsplit_once(" of ").unwrap();
    let right = right.rsplit_once('\n').unwrap().1;
    assert!(right == rest && right.parse::<u32>().unwrap() >= 10 && !out.contains('✗'), "{out}");
    assert_eq!(out.matches('✓').count().to_string(), right, "{out}");
    assert!(err.contains("experts (MXFP4, packed, as the file is mapped)"), "{err}");
    for name in ["checkpoint/model.safetensors", "model.bin"] {
        assert!(PathBuf::from(&folder).join(name).is_file(), "{name}");
    }
    // What it exported is a model like any other; the folder is not used again.
    expect(0, &["verify", &format!("{folder}/model.bin"), "-q"]);
    let (_, err) = ended(2, &gptoss(&["demo", "-d", &folder]));
    assert!(err.contains("--dst"), "{err}");
}
