//! Requests and answers with JSON bodies.

use std::fmt::Write;
use std::path::Path;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::{Client, Error, Result};
use crate::api::{EPOCH_HEADER, ErrorBody};

/// A name as one piece of a path.
pub(super) fn escape(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' | b'-' => out.push(byte.into()),
            other => write!(out, "%{other:02X}").expect("writing to a string does not fail"),
        }
    }
    // `.` and `..` would be taken for steps in the path; no sandbox has such a name.
    match out.as_str() {
        "." => "%2E".into(),
        ".." => "%2E%2E".into(),
        _ => out,
    }
}

pub(super) async fn connect(socket: &Path) -> Result<UnixStream> {
    UnixStream::connect(socket)
        .await
        .map_err(|source| Error::Connect {
            path: socket.to_owned(),
            source,
        })
}

/// Sends a request; an answer that is not a success becomes an error.
pub(super) async fn exchange(
    socket: &Path,
    method: Method,
    path: &str,
    epoch: Option<u64>,
    body: Vec<u8>,
) -> Result<Response<Incoming>> {
    let stream = TokioIo::new(connect(socket).await?);
    let (mut sender, connection) = http1::handshake(stream).await.map_err(Error::broken)?;
    // It ends with the answer; what breaks it is told to the one who waits for that.
    tokio::spawn(connection);
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "deltabox")
        .header("content-type", "application/json");
    if let Some(epoch) = epoch {
        request = request.header(EPOCH_HEADER, epoch);
    }
    let request = request
        .body(Full::new(Bytes::from(body)))
        .map_err(Error::broken)?;
    let response = sender.send_request(request).await.map_err(Error::broken)?;
    if response.status().is_success() {
        return Ok(response);
    }
    let status = response.status();
    Err(refused(status, &collect(response).await?))
}

pub(super) fn refused(status: StatusCode, body: &[u8]) -> Error {
    match serde_json::from_slice::<ErrorBody>(body) {
        Ok(ErrorBody { error }) => Error::Refused {
            status: status.as_u16(),
            code: error.code,
            message: error.message,
        },
        Err(_) => Error::broken(format!("an answer {status} that is not DeltaBox's")),
    }
}

async fn collect(response: Response<Incoming>) -> Result<Bytes> {
    let body = response.into_body().collect().await;
    Ok(body.map_err(Error::broken)?.to_bytes())
}

impl Client {
    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.request(Method::GET, path, None, &()).await
    }

    pub(super) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T> {
        self.request(Method::POST, path, None, body).await
    }

    pub(super) async fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        epoch: Option<u64>,
        body: &impl Serialize,
    ) -> Result<T> {
        let answer = self.exchange(method, path, epoch, body).await?;
        serde_json::from_slice(&collect(answer).await?).map_err(Error::broken)
    }

    /// A request whose answer carries nothing.
    pub(super) async fn send(
        &self,
        method: Method,
        path: &str,
        epoch: Option<u64>,
        body: &impl Serialize,
    ) -> Result<()> {
        self.exchange(method, path, epoch, body).await.map(drop)
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        epoch: Option<u64>,
        body: &impl Serialize,
    ) -> Result<Response<Incoming>> {
        let body = match serde_json::to_vec(body).map_err(Error::broken)? {
            null if null == b"null" => Vec::new(),
            json => json,
        };
        exchange(&self.socket, method, path, epoch, body).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_name_stays_one_piece_of_the_path() {
        assert_eq!(escape("web-1.a_B"), "web-1.a_B");
        assert_eq!(escape("../x?y#z%"), "..%2Fx%3Fy%23z%25");
        assert_eq!(escape(".."), "%2E%2E");
    }
}
