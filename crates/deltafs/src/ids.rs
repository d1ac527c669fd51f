//! How the ids inside a sandbox show on the host.

/// The id that stands for every one that the sandbox has no name for.
const NOBODY: u32 = 65534;

/// Maps user and group ids inside a sandbox to ids of the host: `i` inside is `outside_first + i`
/// outside. The same map serves users and groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdMap {
    /// The host id of the sandbox's root.
    pub outside_first: u32,
    /// How many ids there are. Ids of the base that are not below it show as 65534 (nobody).
    pub count: u32,
}

impl IdMap {
    /// The map that changes nothing.
    pub const IDENTITY: Self = Self {
        outside_first: 0,
        count: u32::MAX,
    };

    /// Whether the map holds `nobody`.
    pub(crate) fn is_wide_enough(self) -> bool {
        self.count > NOBODY && self.outside_first.checked_add(self.count).is_some()
    }

    /// The host's id for an id inside.
    pub(crate) fn outside(self, inside: u32) -> u32 {
        let id = if inside < self.count { inside } else { NOBODY };
        self.outside_first + id
    }

    /// The id inside for one of the host. The host's own root acts as the sandbox's root.
    pub(crate) fn inside(self, outside: u32) -> u32 {
        match outside.checked_sub(self.outside_first) {
            Some(id) if id < self.count => id,
            _ if outside == 0 => 0,
            _ => NOBODY,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_shift_there_and_back_and_foreign_ids_are_nobody() {
        let map = IdMap {
            outside_first: 100_000,
            count: 65_536,
        };
        assert!(map.is_wide_enough());
        assert_eq!(map.outside(0), 100_000);
        assert_eq!(map.inside(100_007), 7);
        assert_eq!(map.outside(70_000), 165_534);
        assert_eq!(map.inside(5), NOBODY);
        assert_eq!(map.inside(0), 0);
        assert!(IdMap::IDENTITY.is_wide_enough());
        assert!(
            !IdMap {
                outside_first: 1,
                count: 10
            }
            .is_wide_enough()
        );
    }
}
