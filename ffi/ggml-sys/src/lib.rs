//! Raw bindings to the ggml that `build.rs` compiles. See ggml's headers for what each item does; the
//! engine's safe wrapper is `transnormer::ggml`.
#![allow(non_camel_case_types, non_snake_case, non_upper_case_globals, missing_docs, clippy::all)]

mod bindings;
pub use bindings::*;
