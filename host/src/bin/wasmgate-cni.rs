//! The CNI plugin; everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    hostd::cni::main()
}
