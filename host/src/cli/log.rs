//! What hostd logs.

use tracing_subscriber::{
    filter::{LevelFilter, Targets},
    fmt,
    layer::SubscriberExt as _,
    util::SubscriberInitExt as _,
};

/// Logs to stderr what the variable `HOSTD_LOG` asks for: a level, or levels by module with commas between them.
pub(super) fn start(levels: Option<&str>) -> anyhow::Result<()> {
    let lines = fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    tracing_subscriber::registry()
        .with(parse(levels.unwrap_or_default())?)
        .with(lines)
        .init();
    Ok(())
}

fn parse(levels: &str) -> anyhow::Result<Targets> {
    if levels.trim().is_empty() {
        return Ok(Targets::new().with_default(LevelFilter::INFO));
    }
    let wrong = || {
        anyhow::anyhow!(
            "HOSTD_LOG is {levels:?}: it takes a level (off, error, warn, info, debug or trace), or levels by module, as \
             in info,hostd::store=debug"
        )
    };
    let is_level = |level: &str| !level.trim().is_empty() && level.trim().parse::<LevelFilter>().is_ok();
    let is_module = |module: &str| {
        let module = module.trim();
        !module.is_empty()
            && module
                .chars()
                .all(|letter| letter.is_ascii_alphanumeric() || "_:".contains(letter))
    };
    let known = |directive: &str| match directive.split_once('=') {
        Some((module, level)) => is_module(module) && is_level(level),
        None => is_level(directive),
    };
    if !levels.split(',').all(known) {
        return Err(wrong());
    }
    levels.replace(char::is_whitespace, "").parse().map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::parse;
    use tracing::Level;

    #[test]
    fn levels_are_those_that_were_asked_for() {
        let shows = |levels: &str, module: &str, level: Level| parse(levels).unwrap().would_enable(module, &level);
        assert!(shows("", "hostd::store", Level::INFO) && !shows("", "hostd::store", Level::DEBUG));
        assert!(shows("debug", "hostd::store", Level::DEBUG));
        assert!(!shows("off", "hostd::store", Level::ERROR));
        let one = "info, hostd::store=debug";
        assert!(shows(one, "hostd::store::etcd", Level::DEBUG) && !shows(one, "hostd::plan", Level::DEBUG));
    }

    #[test]
    fn what_is_no_level_is_refused() {
        for wrong in [
            "loud",
            "hostd=loud",
            "hostd",
            "info,,debug",
            "hostd[span]=info",
            "=info",
        ] {
            let said = parse(wrong).map(|levels| levels.to_string()).unwrap_err().to_string();
            assert!(said.contains(&format!("{wrong:?}")) && said.contains("warn"), "{said}");
        }
    }
}
