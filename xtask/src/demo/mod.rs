//! The demo (placeholder until written below).

/// Runs it.
pub fn run(_keep: bool) -> anyhow::Result<()> {
    Ok(())
}
