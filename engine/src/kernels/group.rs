//! Groups of lanes: the units that sum a row together.
//!
//! A group is a plane (warp, subgroup) where a device has plane operations of one known width. Software Vulkan has none,
//! and some GPUs choose the width as they like: there a group is 32 units that meet in shared memory.

use cubecl::client::Client;
use cubecl::ir::features::Plane;
use cubecl::prelude::*;

/// Four 32-bit words, 16 bytes: the widest load.
pub(crate) type U4 = Vector<u32, Const<4>>;
/// Four f32, 16 bytes.
pub(crate) type F4 = Vector<f32, Const<4>>;

/// How a device groups its units.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Group {
    /// Units of a group.
    pub lanes: u32,
    /// Whether the group is a plane.
    pub plane: bool,
}

impl Group {
    /// The group of a device.
    pub fn of(client: &Client) -> Group {
        let properties = client.properties();
        let hardware = &properties.hardware;
        let width = hardware.plane_size_max;
        let plane =
            properties.features.plane.contains(Plane::Ops) && hardware.plane_size_min == width && width > 0;
        Group { lanes: if plane { width } else { 32 }, plane }
    }

    /// Every group that a device can have, the one of its choice first.
    pub(crate) fn all(client: &Client) -> Vec<Group> {
        let portable = Group { lanes: 32, plane: false };
        let best = Group::of(client);
        if best.plane { vec![best, portable] } else { vec![portable] }
    }

    /// The group for rows of `parts` parts: unless it is a plane, it has no more lanes than that, and a cube more groups, by the
    /// factor that is returned.
    pub(crate) fn for_parts(self, parts: usize) -> (Group, u32) {
        if self.plane {
            return (self, 1);
        }
        let factor = (self.lanes / parts.next_power_of_two() as u32).max(1);
        (Group { lanes: self.lanes / factor, ..self }, factor)
    }

    /// What it is called.
    pub(crate) fn name(self) -> &'static str {
        if self.plane { "planes" } else { "shared memory" }
    }
}

/// The sum of `value` over the lanes of the group, valid in lane 0. Cubes are `[lanes, groups]`; all units of a cube call it.
#[cube]
pub(crate) fn group_sum(value: f32, #[comptime] group: Group, #[comptime] groups: u32) -> f32 {
    if comptime!(group.plane) {
        plane_sum(value)
    } else {
        let mut shared = Shared::<[f32]>::new_slice(comptime!((group.lanes * groups) as usize));
        sync_cube();
        shared[UNIT_POS as usize] = value;
        sync_cube();
        let mut total = 0.0f32;
        if UNIT_POS_X == 0 {
            for lane in 0..comptime!(group.lanes as usize) {
                total += shared[UNIT_POS as usize + lane];
            }
        }
        total
    }
}

/// The number of the cube in a grid of two axes.
#[cube]
pub(crate) fn cube_number() -> usize {
    CUBE_POS_Y as usize * CUBE_COUNT_X as usize + CUBE_POS_X as usize
}
