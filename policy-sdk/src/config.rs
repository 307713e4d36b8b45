//! Configurations: what an admin wrote, as what the author wants.

use serde::de::DeserializeOwned;
use serde_json::Value;

/// Reads a value as what it should be.
///
/// # Errors
///
/// The field and the reason, as `rules[2].port: invalid value: …`.
///
/// ```
/// #[derive(serde::Deserialize)]
/// struct Rule {
///     port: u16,
/// }
///
/// let wrong = serde_json::json!([{"port": 80}, {"port": 70000}]);
/// let error = policy_sdk::typed::<Vec<Rule>>(&wrong).err().unwrap_or_default();
/// assert!(error.starts_with("[1].port: invalid value: integer `70000`"), "{error}");
/// ```
pub fn typed<T: DeserializeOwned>(value: &Value) -> Result<T, String> {
    serde_path_to_error::deserialize(value).map_err(|error| match error.path().to_string().as_str() {
        "." => error.inner().to_string(),
        path => format!("{path}: {}", error.inner()),
    })
}

/// Reads a policy's configuration: JSON text, empty where none was given.
pub(crate) fn read_config<C: DeserializeOwned>(text: &str) -> Result<C, String> {
    if text.is_empty() {
        // Nothing to set, or a structure all of whose fields have defaults.
        return serde_json::from_str("null")
            .or_else(|_| serde_json::from_str("{}"))
            .map_err(|error| format!("this policy needs a configuration: {error}"));
    }
    let value: Value = serde_json::from_str(text).map_err(|error| format!("configuration: {error}"))?;
    typed(&value).map_err(|problem| format!("configuration: {problem}"))
}
