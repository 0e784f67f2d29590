//! The `tn` command as its users see it: output, errors and exit codes.

use std::{
    io::{Read, Write},
    path::PathBuf,
    process::{Command, Output, Stdio},
};

use serde_json::Value;

fn model() -> String {
    root().join("models/fable-8m/fable-8m-Q8_0.gguf").to_str().unwrap().to_owned()
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tn"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn tn(args: &[&str]) -> Output {
    command(args).output().unwrap()
}

/// `tn` with something on standard input.
fn tn_with(args: &[&str], input: &[u8]) -> Output {
    let mut child = command(args).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    child.wait_with_output().unwrap()
}

/// `tn run` on the bundled model, quietly and briefly.
fn run(args: &[&str]) -> Output {
    tn(&[&["run", &model(), "-q", "-n", "5"][..], args].concat())
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", stderr(output));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Fails with `code` and one line that begins with `tn: ` and holds `parts`.
fn assert_fails(output: &Output, code: i32, parts: &[&str]) {
    let error = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{error}");
    assert!(error.starts_with("tn: ") && error.ends_with('\n') && error.lines().count() == 1, "{error}");
    parts.iter().for_each(|part| assert!(error.contains(part), "{error}"));
    assert!(output.stdout.is_empty());
}

#[test]
fn help_shows_examples() {
    assert!(stdout(&tn(&["--help"])).contains("Exit codes:"));
    for name in ["run", "chat", "inspect", "logits", "bench"] {
        assert!(stdout(&tn(&[name, "--help"])).contains(&format!("Examples:\n  tn {name} model.gguf")));
    }
    assert!(stdout(&tn(&["--version"])).starts_with("tn "));
}

#[test]
fn wrong_usage_is_exit_code_2() {
    let model = model();
    for args in [
        &[][..],
        &["walk"],
        &["run"],
        &["run", &model, "a", "--no-such-option"],
        &["run", &model, "a", "-n", "-2"],
        &["run", &model, "a", "-t", "0"],
        &["run", &model, "a", "--greedy", "--temp", "1"],
        &["logits", &model],
        &["logits", &model, "--ids", "1", "--text", "a"],
    ] {
        let output = tn(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(!output.stderr.is_empty() && output.stdout.is_empty(), "{args:?}");
    }
    assert_fails(&run(&["a", "--top-p", "1.5"]), 2, &["top_p is 1.5"]);
    assert_fails(&run(&["a", "--stop", ""]), 2, &["stop string"]);
    assert_fails(&tn(&["logits", &model, "--ids", "99999999"]), 2, &["99999999"]);
    assert_fails(&tn(&["logits", &model, "--text", ""]), 2, &["empty"]);
}

#[test]
fn files_that_are_no_models_are_named() {
    let no_model = root().join("Cargo.toml");
    let no_model = no_model.to_str().unwrap();
    for command in ["run", "chat", "logits", "bench", "inspect"] {
        let args = |file| {
            let rest: &[&str] = match command {
                "run" => &["a"],
                "logits" => &["--ids", "1"],
                _ => &[],
            };
            [&[command, file][..], rest].concat()
        };
        assert_fails(&tn(&args("nowhere.gguf")), 1, &["nowhere.gguf", "tn-quantize"]);
        assert_fails(&tn(&args(env!("CARGO_MANIFEST_DIR"))), 1, &["folder"]);
        assert_fails(&tn(&args(no_model)), 1, &["Cargo.toml", "not a GGUF file"]);
    }
    assert_fails(&run(&["--file", "nowhere.txt"]), 1, &["nowhere.txt"]);
}

#[test]
fn prompts_come_from_argument_file_and_input() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompt.txt");
    std::fs::write(&file, "Once upon a time\n").unwrap();
    let model = model();
    let run_with = |args: &[&str], input: &[u8]| {
        stdout(&tn_with(&[&["run", &model, "-q", "-n", "5", "--greedy"][..], args].concat(), input))
    };
    let wanted = run_with(&["Once upon a time"], b"not read");
    assert!(wanted.len() > 5 && !wanted.contains("upon"), "{wanted:?}");
    assert_eq!(run_with(&["--file", file.to_str().unwrap()], b""), wanted);
    assert_eq!(run_with(&["-"], b"Once upon a time\r\n"), wanted);
    assert_eq!(run_with(&[], b"Once upon a time"), wanted);
    assert_eq!(run_with(&["Once upon a time", "--echo"], b""), format!("Once upon a time{wanted}"));
    let bad = tn_with(&["run", &model, "-"], b"abc\xFF");
    assert_fails(&bad, 1, &["standard input", "not UTF-8 at byte 3"]);
}

#[test]
fn empty_and_chinese_prompts_work() {
    assert!(!stdout(&run(&["", "--greedy"])).trim().is_empty());
    let text = stdout(&run(&["从前有一个", "--greedy", "--echo"]));
    assert!(text.starts_with("从前有一个") && text.trim_end().chars().count() > 5, "{text}");
}

#[test]
fn seeds_repeat_and_differ() {
    let text = |seed: &str| stdout(&run(&["The", "--temp", "1.5", "--top-k", "0", "--seed", seed]));
    assert_eq!(text("1"), text("1"));
    assert_ne!(text("1"), text("2"));
}

#[test]
fn no_tokens_is_no_text() {
    assert_eq!(stdout(&run(&["The", "-n", "0"])), "\n");
    assert_eq!(stdout(&run(&["The", "-n", "0", "--echo"])), "The\n");
}

#[test]
fn stop_strings_end_the_text() {
    let text = stdout(&run(&["Once upon a time", "--greedy"]));
    let text = text.trim_end();
    let (cut, _) = text.char_indices().nth(text.chars().count() / 2).unwrap();
    let stop = &text[cut..];
    let before = &text[..text.find(stop).unwrap()];
    let stopped = stdout(&run(&["Once upon a time", "--greedy", "--stop", "@@@", "--stop", stop]));
    assert_eq!(stopped, format!("{before}\n"));
}

#[test]
fn the_summary_is_on_standard_error() {
    let output = tn(&["run", &model(), "Once", "-n", "2", "--seed", "5", "-t", "1"]);
    stdout(&output);
    let summary = stderr(&output);
    for part in ["prompt", "answer        2 tokens", "state 448.00 KiB", "threads  1, seed 5"] {
        assert!(summary.contains(part), "{summary}");
    }
    assert_eq!(stderr(&run(&["Once"])), "");
}

#[test]
fn chat_answers_each_line() {
    let input = b"Hello\n/nonsense\n/reset\nHello\n/stats\n/help\n/quit\nnot read\n";
    let output = tn_with(&["chat", &model(), "-n", "3", "--greedy"], input);
    let text = stdout(&output);
    // Forgetting the first makes the second answer equal.
    let (answers, _) = text.split_once("read  ").unwrap();
    let (first, second) = answers.split_at(answers.len() / 2);
    assert!(first == second && !first.trim().is_empty(), "{text}");
    assert!(text.contains("answered  ") && text.contains("/reset  forget"), "{text}");
    assert_eq!(stderr(&output), "/nonsense: no such command; try /help\n");
}

#[test]
fn inspect_shows_metadata_and_tensors() {
    let model = model();
    let text = stdout(&tn(&["inspect", &model, "--tensors"]));
    for part in ["general.architecture", "\"transnormer\"", "token_embd.weight", "256 x 8192", "Q8_0"] {
        assert!(text.contains(part), "{text}");
    }
    assert!(!stdout(&tn(&["inspect", &model])).contains("token_embd.weight"));
    let json: Value = serde_json::from_str(&stdout(&tn(&["inspect", &model, "--json"]))).unwrap();
    assert_eq!(json["metadata"]["transnormer.block_count"], 6);
    assert_eq!(json["metadata"]["tokenizer.ggml.tokens"].as_array().unwrap().len(), 8192);
    assert_eq!(json["parameters"], 7_602_432);
    let tensors = json["tensors"].as_array().unwrap();
    let bytes: u64 = tensors.iter().map(|tensor| tensor["bytes"].as_u64().unwrap()).sum();
    assert_eq!(json["bits_per_weight"].as_f64().unwrap(), bytes as f64 * 8.0 / 7_602_432.0);
}

#[test]
fn inspect_reads_other_architectures() {
    use transnormer::{
        DType,
        gguf::{Metadata, TensorSpec, Writer},
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other.gguf");
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", "llama");
    metadata.insert("evil", "\u{1b}[2J");
    let tensor = TensorSpec { name: "t".into(), shape: vec![4], dtype: DType::F32 };
    let mut writer = Writer::create(&path, &metadata, &[tensor]).unwrap();
    writer.write(&[0; 16]).unwrap();
    writer.finish().unwrap();
    let text = stdout(&tn(&["inspect", path.to_str().unwrap()]));
    assert!(text.contains("\"llama\"") && !text.contains('\u{1b}'), "{text}");
    assert_fails(&tn(&["run", path.to_str().unwrap(), "a"]), 1, &["other.gguf", "'llama'"]);
}

#[test]
fn logits_are_equal_for_ids_and_text() {
    let model = model();
    let json = |args: &[&str]| -> Value {
        serde_json::from_str(&stdout(&tn(&[&["logits", &model, "--json"][..], args].concat()))).unwrap()
    };
    let text = json(&["--text", "Once upon"]);
    let ids: Vec<String> = text["ids"].as_array().unwrap().iter().map(Value::to_string).collect();
    let by_ids = json(&["--ids", &ids.join(",")]);
    assert_eq!(by_ids, text);
    assert_eq!(by_ids["logits"].as_array().unwrap().len(), 8192);
    let all = json(&["--ids", &ids.join(","), "--all"]);
    let rows = all["logits"].as_array().unwrap();
    assert_eq!(rows.len(), ids.len());
    let largest = |row: &Value| {
        let row: Vec<f64> = row.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
        (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap()
    };
    assert_eq!(largest(&rows[ids.len() - 1]), largest(&by_ids["logits"]));
    let table = stdout(&tn(&["logits", &model, "--ids", &ids.join(","), "--all"]));
    assert_eq!(table.matches("after token").count(), ids.len());
}

#[test]
fn bench_reports_each_test() {
    let model = model();
    let bench = |args: &[&str]| {
        stdout(&tn(&[&["bench", &model, "-n", "2", "-r", "2", "-t", "1"][..], args].concat()))
    };
    let table = bench(&["-p", "8", "-d", "0,9"]);
    let tests: Vec<_> = table.lines().map(|line| line.split('|').nth(6).unwrap().trim()).collect();
    assert_eq!(tests, ["test", "--------------:", "pp8", "tg2", "pp8 @ d9", "tg2 @ d9"], "{table}");
    let rows: Value = serde_json::from_str(&bench(&["-p", "0", "-d", "0", "--json"])).unwrap();
    assert_eq!(rows.as_array().unwrap().len(), 1);
    assert_eq!((&rows[0]["n_gen"], &rows[0]["n_prompt"]), (&Value::from(2), &Value::from(0)));
    assert_eq!(rows[0]["samples_ns"].as_array().unwrap().len(), 2);
    assert!(rows[0]["avg_ts"].as_f64().unwrap() > 0.0);
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_the_text_with_a_summary() {
    let mut child = command(&["run", &model(), "Once", "-n", "-1", "--ignore-eos"]).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    out.read_exact(&mut [0]).unwrap();
    // The shell's own kill: a bare system has no other.
    let interrupt = Command::new("sh").args(["-c", &format!("kill -INT {}", child.id())]).status().unwrap();
    assert!(interrupt.success());
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(rest.ends_with('\n') && stderr(&output).contains("answer"), "{}", stderr(&output));
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let mut child = command(&["run", &model(), "Once", "-n", "-1", "--ignore-eos"]).spawn().unwrap();
    child.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error() {
    let full = std::fs::File::create("/dev/full").unwrap();
    let output = command(&["run", &model(), "Once", "-n", "1", "-q"]).stdout(full).output().unwrap();
    assert_fails(&output, 1, &["standard output"]);
}
