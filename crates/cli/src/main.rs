//! The `cutover` command.

fn main() -> std::process::ExitCode {
    cutover_cli::main()
}
