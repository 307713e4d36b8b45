//! What authors use: a new crate, and modules tested, measured and looked into without a daemon.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which fail as a whole")]

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

fn hostd(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(harness::hostd().unwrap())
        .current_dir(folder)
        .args(arguments)
        .output()
        .unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn a_new_crate_builds_and_its_tests_pass() {
    let folder = tempfile::tempdir().unwrap();
    let sdk = toolchain::workspace_root().join("policy-sdk").display().to_string();
    let made = hostd(folder.path(), &["policy", "new", "my-policy", "--sdk", &sdk]);
    assert!(made.status.success(), "{}", text(&made));
    let tested = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["test", "--quiet", "--target-dir"])
        .arg(toolchain::target_dir().join("tmp/my-policy"))
        .current_dir(folder.path().join("my-policy"))
        .output()
        .unwrap();
    assert!(tested.status.success(), "{}", text(&tested));
    assert!(text(&tested).contains("2 passed"), "{}", text(&tested));

    for (arguments, expected) in [
        (
            &["policy", "new", "my-policy", "--sdk", &sdk][..],
            "my-policy exists already",
        ),
        (
            &["policy", "new", "My_Policy", "--sdk", &sdk],
            "a crate's name has lower-case letters",
        ),
        (
            &["policy", "new", "crate", "--sdk", &sdk],
            "\"crate\" means something to Rust",
        ),
        (&["policy", "new", "other"], "say where its SDK is with --sdk"),
        (&["policy", "new", "other", "--sdk", "/"], "not the folder `policy-sdk`"),
    ] {
        let refused = hostd(folder.path(), arguments);
        assert!(!refused.status.success());
        assert!(text(&refused).contains(expected), "{}", text(&refused));
    }
    assert!(!folder.path().join("other").exists() && !folder.path().join("crate").exists());
}

#[test]
fn a_new_crate_of_a_checkout_takes_no_other_crates_name() {
    let checkout = tempfile::tempdir().unwrap();
    let policies = checkout.path().join("policies");
    fs::create_dir(&policies).unwrap();
    let root = toolchain::workspace_root();
    std::os::unix::fs::symlink(root.join("policy-sdk"), checkout.path().join("policy-sdk")).unwrap();
    fs::copy(root.join("Cargo.lock"), checkout.path().join("Cargo.lock")).unwrap();
    for name in ["hostd", "tenant-isolation"] {
        let refused = hostd(&policies, &["policy", "new", name]);
        let expected = format!("the checkout has a crate {name:?}");
        assert!(
            !refused.status.success() && text(&refused).contains(&expected),
            "{}",
            text(&refused)
        );
        assert!(!policies.join(name).exists());
    }
    // A dependency's is nobody's here.
    let made = hostd(&policies, &["policy", "new", "anyhow"]);
    assert!(made.status.success(), "{}", text(&made));
}

#[test]
fn a_damaged_module_is_refused_for_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let whole = fs::read(harness::policy("tenant-isolation").unwrap()).unwrap();
    for length in [9, 200, 2000, 30_000, 100_000, whole.len() - 1] {
        fs::write(folder.path().join("cut.wasm"), &whole[..length]).unwrap();
        let refused = hostd(folder.path(), &["policy", "inspect", "cut.wasm"]);
        assert!(!refused.status.success(), "{length} bytes");
        let said = text(&refused);
        assert!(
            said.contains("offset") && !said.contains("too small"),
            "{length} bytes: {said}"
        );
    }
}

#[test]
fn a_module_is_held_against_expectations() {
    let folder = tempfile::tempdir().unwrap();
    let module = harness::policy("network-policy").unwrap().display().to_string();
    let write = |name: &str, text: &str| {
        fs::write(folder.path().join(name), text).unwrap();
        name.to_owned()
    };
    let config = write(
        "np.yaml",
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p, namespace: shop}\nspec: {podSelector: {matchLabels: {app: db}}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: web}}}, {ipBlock: {cidr: 203.0.113.0/24}}], ports: [{port: sql}]}]}\n",
    );
    let cases = |allow: bool| {
        format!(
            "namespaces: {{web: {{team: web}}}}\npods:\n- {{name: shop/db, labels: {{app: db}}, ports: {{sql: tcp/5432}}}}\n- {{name: web/a}}\n- {{name: shop/b}}\nexpect:\n- {{from: web/a, to: shop/db, port: tcp/5432, allow: true}}\n- {{from: 203.0.113.7, to: shop/db, port: tcp/5432, allow: true}}\n- {{from: world, to: shop/db, port: tcp/5432, allow: false}}\n- {{from: shop/b, to: shop/db, port: tcp/5432, allow: {allow}}}\n"
        )
    };
    let right = write("right.yaml", &cases(false));
    let output = hostd(folder.path(), &["policy", "test", &module, &right, "--config", &config]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("4 expectations, 0 wrong"));
    let wrong = write("wrong.yaml", &cases(true));
    let output = hostd(folder.path(), &["policy", "test", &module, &wrong, "--config", &config]);
    assert!(!output.status.success());
    let said = text(&output);
    assert!(
        said.contains("shop/b -> shop/db tcp/5432: should be allowed, is denied"),
        "{said}"
    );
    assert!(said.contains("no rule of NetworkPolicy shop/p allows it"), "{said}");

    let unknown = write(
        "unknown.json",
        r#"{"pods": [], "expect": [{"from": "x", "to": "y", "port": "tcp/1", "allow": true}]}"#,
    );
    let output = hostd(
        folder.path(),
        &["policy", "test", &module, &unknown, "--config", &config],
    );
    assert!(
        text(&output).contains("\"x\" is no pod of the file"),
        "{}",
        text(&output)
    );
}

#[test]
fn a_module_is_measured_and_looked_into() {
    let folder = tempfile::tempdir().unwrap();
    let module = harness::policy("web-app").unwrap().display().to_string();
    let output = hostd(folder.path(), &["policy", "bench", &module, "--identities", "50"]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("50 pods, 50 identities"), "{}", text(&output));
    let output = hostd(folder.path(), &["--json", "policy", "inspect", &module]);
    let shown: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(shown["interface"], "wasmgate:policy/policy@0.2.0");
    assert_eq!(shown["bytes"], fs::metadata(&module).unwrap().len());
    let output = hostd(folder.path(), &["policy", "inspect", "/nonexistent.wasm"]);
    assert!(!output.status.success() && text(&output).contains("/nonexistent.wasm"));
}
