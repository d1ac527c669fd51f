//! Which sockets can stay.

use super::model::{Pending, Socket, State};
use crate::fd::model::{Descriptors, Kind};

/// Whether `now` by itself can become `wanted`. [`verify`] looks at their peers.
pub(crate) fn alike(now: &Socket, wanted: &Socket) -> bool {
    let same_kind = (now.domain, now.kind, now.protocol)
        == (wanted.domain, wanted.kind, wanted.protocol)
        && (&now.local, &now.remote, now.file) == (&wanted.local, &wanted.remote, wanted.file);
    // A direction that is shut down stays so, and nothing can be sent through it.
    let open_enough =
        now.shutdown & !wanted.shutdown == 0 && (now.has_same_queue(wanted) || now.shutdown == 0);
    // What has a filter must lose it before its queue is filled again.
    let same_filter = now.filter == wanted.filter && now.has_same_queue(wanted);
    let settable = wanted.options.iter().all(|goal| {
        let mut options = now.options.iter();
        let have = options.find(|have| (have.level, have.name) == (goal.level, goal.name));
        have.is_none_or(|have| goal.can_follow(have))
    });
    let free_enough = if now.is_locked() {
        same_filter && wanted.is_locked()
    } else {
        true
    };
    same_kind
        && open_enough
        && free_enough
        && settable
        && match (&now.state, &wanted.state) {
            (State::Idle, State::Idle)
            | (State::Ended, State::Ended)
            | (State::Cut, State::Cut)
            | (State::Listening { .. }, State::Listening { .. })
            | (State::Connected { .. }, State::Connected { .. }) => true,
            (State::Orphaned, State::Orphaned) | (State::Abandoned, State::Abandoned) => {
                now.has_same_queue(wanted)
            }
            (State::Outside, State::Outside) => now.inode == wanted.inode,
            _ => false,
        }
}

/// Gives up pairs of sockets whose peers are not paired likewise.
pub(crate) fn verify(current: &Descriptors, target: &Descriptors, reuse: &mut [Option<usize>]) {
    loop {
        let mut given_up = Vec::new();
        for (index, object) in target.objects.iter().enumerate() {
            let Kind::Socket(wanted) = &object.kind else {
                continue;
            };
            let Some(now) = reuse[index].and_then(|now| socket(current, now)) else {
                continue;
            };
            match (&now.state, &wanted.state) {
                (State::Connected { peer: now_peer }, State::Connected { peer }) => {
                    let blocked = !now.has_same_queue(wanted)
                        && socket(current, *now_peer).is_some_and(|peer| peer.shutdown != 0);
                    if reuse[*peer] != Some(*now_peer) || blocked {
                        given_up.push(index);
                    }
                }
                (State::Listening { pending: now, .. }, State::Listening { pending, .. })
                    if !waits_alike(now, pending, reuse) =>
                {
                    let clients = pending.iter().filter_map(|p| p.client);
                    given_up.extend(clients.filter(|&client| reuse[client].is_some()));
                }
                _ => {}
            }
        }
        if given_up.is_empty() {
            return;
        }
        for index in given_up {
            reuse[index] = None;
        }
    }
}

/// Whether the connections that wait at a listening socket can go on waiting: what they have sent cannot be put right.
pub(super) fn waits_alike(now: &[Pending], wanted: &[Pending], reuse: &[Option<usize>]) -> bool {
    now.len() == wanted.len()
        && now.iter().zip(wanted).all(|(now, wanted)| {
            let client = wanted.client.and_then(|client| reuse[client]);
            now.is_quiet() && wanted.is_quiet() && client == now.client
        })
}

pub(super) fn socket(image: &Descriptors, index: usize) -> Option<&Socket> {
    match &image.objects.get(index)?.kind {
        Kind::Socket(socket) => Some(socket),
        _ => None,
    }
}
