//! The binary `soe`: daemon and command line.

fn main() -> std::process::ExitCode {
    soe_agent::cli::main()
}
