//! Compiles ggml's core and CPU back end with the C++ compiler alone.
//!
//! The sources are those of the package named in Cargo.toml under a cfg that is never true: `cargo
//! metadata --locked` downloads it if needed, checks it against Cargo.lock, and tells the folder.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

const SOURCE_PACKAGE: &str = "llama-cpp-sys-2";

/// ggml's core: tensors, graphs, allocation, quantizers, the back-end interface.
const CORE_C: [&str; 3] = ["ggml.c", "ggml-alloc.c", "ggml-quants.c"];
const CORE_CPP: [&str; 4] = ["ggml.cpp", "ggml-backend.cpp", "ggml-backend-meta.cpp", "ggml-threading.cpp"];

/// The CPU back end, once, at the target's baseline instruction set: the kernels that matter for speed
/// are the engine's own and pick their instruction set at run time (ARCHITECTURE.md, "Kernels").
const CPU_C: [&str; 2] = ["ggml-cpu/ggml-cpu.c", "ggml-cpu/quants.c"];
const CPU_CPP: [&str; 9] = [
    "ggml-cpu/ggml-cpu.cpp",
    "ggml-cpu/ops.cpp",
    "ggml-cpu/binary-ops.cpp",
    "ggml-cpu/unary-ops.cpp",
    "ggml-cpu/vec.cpp",
    "ggml-cpu/traits.cpp",
    "ggml-cpu/tiled/tiled.cpp",
    "ggml-cpu/tiled/tiled-kernel.cpp",
    "ggml-cpu/hbm.cpp",
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=wrapper.h");
    println!("cargo::rerun-if-changed=Cargo.toml");
    let ggml = source_folder();
    let generated = write_version_header(&ggml);
    #[cfg(feature = "generate-bindings")]
    generate_bindings(&ggml);
    compile(&ggml, &generated, false);
    compile(&ggml, &generated, true);
    println!("cargo::metadata=include={}", ggml.join("include").display());
}

/// The folder `ggml/` inside the source package.
fn source_folder() -> PathBuf {
    let manifest =
        PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("Cargo.toml");
    let cargo = env::var_os("CARGO").expect("cargo sets it");
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--locked", "--manifest-path"])
        .arg(&manifest)
        .output()
        .expect("cargo metadata starts");
    if !output.status.success() {
        panic!("cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    let metadata: serde_json::Value =
        serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON");
    let package = metadata["packages"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|package| package["name"] == SOURCE_PACKAGE)
        .unwrap_or_else(|| panic!("{SOURCE_PACKAGE} is not in the dependency graph"));
    let manifest = Path::new(package["manifest_path"].as_str().expect("a package has a manifest"));
    manifest.parent().expect("a manifest lies in a folder").join("llama.cpp/ggml")
}

/// Makes `ggml-version.h`, which ggml's own build derives from its CMakeLists.txt; returns its folder.
fn write_version_header(ggml: &Path) -> PathBuf {
    let lists =
        fs::read_to_string(ggml.join("CMakeLists.txt")).expect("the package carries ggml/CMakeLists.txt");
    let part = |name: &str| {
        let rest = lists.split_once(&format!("set(GGML_VERSION_{name} ")).expect("ggml states its version").1;
        rest.split(')').next().expect("split gives a first part").to_string()
    };
    let version = format!("{}.{}.{}", part("MAJOR"), part("MINOR"), part("PATCH"));
    let folder = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let header = format!("#define GGML_VERSION \"{version}\"\n#define GGML_COMMIT \"{SOURCE_PACKAGE}\"\n");
    fs::write(folder.join("ggml-version.h"), header).expect("OUT_DIR is writable");
    folder
}

fn compile(ggml: &Path, generated: &Path, cpp: bool) {
    let src = ggml.join("src");
    let mut build = cc::Build::new();
    build
        .cpp(cpp)
        .std(if cpp { "c++17" } else { "c11" })
        .include(ggml.join("include"))
        .include(&src)
        .include(src.join("ggml-cpu"))
        .include(generated)
        .define("GGML_SCHED_MAX_COPIES", "4")
        .define("_XOPEN_SOURCE", "600")
        .define("NDEBUG", None)
        .flag_if_supported("-fvisibility=hidden")
        .warnings(false)
        // Unoptimised ggml is of no use to anyone, even in a debug build of the engine.
        .opt_level(3)
        .debug(false);
    let target_os = env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    match target_os.as_str() {
        "linux" | "android" => {
            build.define("_GNU_SOURCE", None);
        }
        "macos" | "ios" => {
            build.define("_DARWIN_C_SOURCE", None);
        }
        _ => {}
    }
    let (core, cpu): (&[&str], &[&str]) = if cpp { (&CORE_CPP, &CPU_CPP) } else { (&CORE_C, &CPU_C) };
    for file in core.iter().chain(cpu) {
        build.file(src.join(file));
    }
    if !cpp && let Some(arch) = arch_folder() {
        build.file(src.join(format!("ggml-cpu/arch/{arch}/quants.c")));
    } else if arch_folder().is_none() {
        build.define("GGML_CPU_GENERIC", None);
    }
    build.compile(if cpp { "ggml-cpp" } else { "ggml-c" });
}

/// ggml's folder of hand-written kernels for the target, where it has one.
fn arch_folder() -> Option<&'static str> {
    match env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default().as_str() {
        "x86_64" | "x86" => Some("x86"),
        "aarch64" | "arm" => Some("arm"),
        _ => None,
    }
}

#[cfg(feature = "generate-bindings")]
fn generate_bindings(ggml: &Path) {
    bindgen::Builder::default()
        .header("wrapper.h")
        .clang_arg(format!("-I{}", ggml.join("include").display()))
        .allowlist_function("ggml_(init|free|version|cpu_init|tensor_overhead|custom_4d|get_type_traits)")
        .allowlist_function(
            "ggml_(new_graph_custom|build_forward_expand|graph_(overhead_custom|plan|compute))",
        )
        .allowlist_function(
            "ggml_gallocr_(new|free|alloc_graph|get_buffer_size)|ggml_backend_cpu_buffer_type",
        )
        .allowlist_function("ggml_threadpool_(new|free|params_default)|ggml_quantize_(init|chunk)")
        .allowlist_type("ggml_(tensor|type|status)")
        .default_enum_style(bindgen::EnumVariation::Consts)
        .prepend_enum_name(false)
        .derive_default(true)
        .layout_tests(false)
        .generate_comments(false)
        .merge_extern_blocks(true)
        .generate()
        .expect("bindgen reads ggml's headers")
        .write_to_file("src/bindings.rs")
        .expect("src/bindings.rs is writable");
}
