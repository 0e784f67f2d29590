//! Promise: the output appears complete or not at all, what was there before stays until then, and the
//! checkpoint is never written to.

mod common;

use std::{fs, thread, time::Duration};

use common::{Sandbox, stderr, tn_quantize};
use serde_json::Value;
use tn_quantize::synthetic::{self, Options};
use transnormer::{dtype::DType, gguf::Gguf};

#[test]
fn an_existing_file_needs_force() {
    let sandbox = Sandbox::tiny();
    fs::write(sandbox.out(), "precious").unwrap();
    let output = sandbox.run(&[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("out.gguf: exists; --force replaces it"), "{}", stderr(&output));
    assert_eq!(fs::read(sandbox.out()).unwrap(), b"precious");
    assert!(sandbox.run(&["--force"]).status.success());
    assert!(Gguf::parse(&fs::read(sandbox.out()).unwrap()).is_ok());
    assert_eq!(sandbox.leftovers(), ["out.gguf"]);
}

#[test]
fn the_checkpoint_is_never_the_output() {
    let sandbox = Sandbox::tiny();
    let weights = fs::read(sandbox.input("model.safetensors")).unwrap();
    fs::hard_link(sandbox.input("model.safetensors"), sandbox.out()).unwrap();
    let direct = |name: &str| {
        tn_quantize().arg(sandbox.input("")).arg(sandbox.input(name)).arg("--force").output().unwrap()
    };
    let outputs = [sandbox.run(&["--force"]), direct("model.safetensors"), direct("config.json")];
    #[cfg(unix)]
    let outputs = {
        fs::remove_file(sandbox.out()).unwrap();
        std::os::unix::fs::symlink(sandbox.input("tokenizer.model"), sandbox.out()).unwrap();
        outputs.into_iter().chain([sandbox.run(&["--force"])])
    };
    for output in outputs {
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains("is part of the checkpoint"), "{}", stderr(&output));
    }
    assert_eq!(fs::read(sandbox.input("model.safetensors")).unwrap(), weights);
}

#[test]
fn a_failure_leaves_the_old_file() {
    let sandbox = Sandbox::tiny();
    fs::write(sandbox.out(), "precious").unwrap();
    // A weight of the last tensor, so that most of the file was written before.
    let path = sandbox.input("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    let output = sandbox.run(&["--force"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("is NaN"), "{}", stderr(&output));
    assert_eq!(
        (fs::read(sandbox.out()).unwrap(), sandbox.leftovers()),
        (b"precious".to_vec(), vec!["out.gguf".into()])
    );
}

#[test]
fn a_dry_run_writes_nothing_and_tells_all() {
    let sandbox = Sandbox::tiny();
    fs::write(sandbox.out(), "precious").unwrap();
    let output = sandbox.run(&["--dry-run", "--json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let planned: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (fs::read(sandbox.out()).unwrap(), sandbox.leftovers()),
        (b"precious".to_vec(), vec!["out.gguf".into()])
    );
    let written: Value = serde_json::from_slice(&sandbox.run(&["--json", "--force"]).stdout).unwrap();
    assert_eq!(planned["tensors"], written["tensors"]);
    assert!(planned["file_bytes"].is_null());
    let file_bytes = fs::metadata(sandbox.out()).unwrap().len();
    assert_eq!(written["file_bytes"], file_bytes);
    assert!(planned["tensor_bytes"].as_u64().unwrap() < file_bytes);
    let table = sandbox.run(&["--dry-run"]).stdout;
    assert!(String::from_utf8(table).unwrap().contains("bits per weight"));
}

#[test]
fn wrong_usage_has_its_own_exit_code() {
    assert_eq!(tn_quantize().output().unwrap().status.code(), Some(2));
    assert_eq!(Sandbox::tiny().run(&["--type", "Q1"]).status.code(), Some(2));
}

/// A full disk, played by a limit on the size of a file.
#[cfg(unix)]
#[test]
fn no_space_left_is_a_clean_error() {
    let sandbox = Sandbox::tiny();
    fs::write(sandbox.out(), "precious").unwrap();
    let script = "trap '' XFSZ; ulimit -f 60; exec \"$0\" \"$@\"";
    let command = sandbox.command(&["--force", "--type", "F32"]);
    let output = std::process::Command::new("sh")
        .args(["-c", script])
        .arg(command.get_program())
        .args(command.get_args())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("out.gguf") && stderr(&output).lines().count() == 1,
        "{}",
        stderr(&output)
    );
    assert_eq!(
        (fs::read(sandbox.out()).unwrap(), sandbox.leftovers()),
        (b"precious".to_vec(), vec!["out.gguf".into()])
    );
}

/// A checkpoint of seven million weights, which takes a moment.
fn slow_checkpoint() -> Sandbox {
    let mut config = synthetic::tiny_config_json();
    for (key, value) in
        [("decoder_embed_dim", 512), ("hidden_dim", 512), ("glu_dim", 1536), ("vocab_size", 1000)]
    {
        config[key] = value.into();
    }
    Sandbox::new(&config, &Options { dtype: DType::F16, ..Options::default() })
}

#[test]
fn a_killed_conversion_leaves_the_target_absent_or_complete() {
    let sandbox = slow_checkpoint();
    let mut killed = 0;
    for delay in [1, 5, 10, 20, 40, 60, 90, 130, 180, 250, 400] {
        let mut child = sandbox.command(&["--force"]).spawn().unwrap();
        thread::sleep(Duration::from_millis(delay));
        let _ = child.kill();
        killed += usize::from(!child.wait().unwrap().success());
        if sandbox.out().exists() {
            Gguf::parse(&fs::read(sandbox.out()).unwrap()).unwrap();
            fs::remove_file(sandbox.out()).unwrap();
        }
    }
    assert!(killed > 0, "no conversion was still running when it was killed");
    assert!(sandbox.run(&["--force"]).status.success());
    assert_eq!(sandbox.leftovers(), ["out.gguf"], "the next run removes what killed ones left");
    Gguf::parse(&fs::read(sandbox.out()).unwrap()).unwrap();
}

/// Ctrl-C ends with its own exit code and leaves nothing behind.
#[cfg(unix)]
#[test]
fn an_interrupt_removes_the_temporary_file() {
    let sandbox = slow_checkpoint();
    fs::write(sandbox.out(), "precious").unwrap();
    let mut child = sandbox.command(&["--force", "--threads", "1"]).spawn().unwrap();
    // The temporary file shows that the conversion has begun, and that the handler is in place.
    while sandbox.leftovers().len() < 2 {
        assert!(child.try_wait().unwrap().is_none(), "the conversion ended too soon to be interrupted");
        thread::sleep(Duration::from_millis(1));
    }
    // The shell's own kill: a bare system has no other.
    let command = format!("kill -INT {}", child.id());
    let interrupt = std::process::Command::new("sh").args(["-c", &command]).status().unwrap();
    assert!(interrupt.success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(
        (fs::read(sandbox.out()).unwrap(), sandbox.leftovers()),
        (b"precious".to_vec(), vec!["out.gguf".into()])
    );
}
