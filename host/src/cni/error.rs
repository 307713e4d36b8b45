//! Errors as container runtimes want them (CNI specification 1.1.0, section 5, "Error").

use crate::api::{ClientError, Failure};
use serde::Serialize;

/// What went wrong, by the specification's codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Code {
    /// Incompatible CNI version.
    Version = 1,
    /// Unsupported field in the network configuration.
    Field = 2,
    /// The container is unknown or does not exist.
    Container = 3,
    /// Invalid environment variables.
    Environment = 4,
    /// The configuration could not be read.
    Io = 5,
    /// The configuration is no JSON, or not of this form.
    Decode = 6,
    /// The network configuration makes no sense.
    Config = 7,
    /// Try again later.
    Later = 11,
    /// No container can be attached.
    NotAvailable = 50,
    /// hostd could not do it.
    Failed = 100,
    /// An attachment is not as it was made.
    Tampered = 101,
}

/// An error, for the runtime.
#[derive(Debug)]
pub struct Error {
    /// Its code.
    pub code: Code,
    /// What is wrong, in a few words.
    pub message: &'static str,
    /// What exactly, and what to do.
    pub details: String,
}

impl Error {
    /// An error.
    pub fn new(code: Code, details: impl Into<String>) -> Self {
        let message = match code {
            Code::Version => "incompatible CNI version",
            Code::Field => "unsupported field in the network configuration",
            Code::Container => "unknown container",
            Code::Environment => "invalid environment variables",
            Code::Io => "the network configuration can't be read",
            Code::Decode => "the network configuration can't be decoded",
            Code::Config => "invalid network configuration",
            Code::Later => "try again later",
            Code::NotAvailable => "no container can be attached",
            Code::Failed => "hostd could not do it",
            Code::Tampered => "the attachment is not as it was made",
        };
        Self {
            code,
            message,
            details: details.into(),
        }
    }

    /// As the runtime reads it.
    pub fn print(&self, version: &str) -> String {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Printed<'a> {
            cni_version: &'a str,
            code: u32,
            msg: &'a str,
            details: &'a str,
        }
        let printed = Printed {
            cni_version: version,
            code: self.code as u32,
            msg: self.message,
            details: &self.details,
        };
        serde_json::to_string_pretty(&printed).unwrap_or_default()
    }
}

impl From<ClientError> for Error {
    fn from(error: ClientError) -> Self {
        let code = match &error {
            ClientError::Failed(Failure::NoContainer, _) => Code::Container,
            ClientError::Failed(Failure::Invalid, _) => Code::Config,
            ClientError::Failed(Failure::Internal, _) => Code::Failed,
            // hostd is not there, or it is starting or stopping.
            _ => Code::Later,
        };
        Self::new(code, error.to_string())
    }
}
