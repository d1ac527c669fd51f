//! Self-checking programs, each untouched, continued, undone in place, rebuilt and forked: all must behave alike.
//!
//! The programs are the functions of `tests/programs/*.py` that are marked `@case`.

use deltabox::{CheckpointId, Gears, Sandbox, SandboxSpec};

use crate::lab::{Lab, Outcome, PYTHON, Program, output, write_file};

const DRIVER: &str = include_str!("../programs/driver.py");

/// A program that checks itself.
struct Fixture {
    /// Where its text is put in the sandbox.
    path: &'static str,
    text: String,
    /// A script that makes a program of the text.
    build: &'static str,
    argv: Vec<&'static str>,
    /// From which amounts on checkpoints and rollbacks work in their second gear.
    gears: Gears,
    /// The sandbox that it is to run in.
    spec: SandboxSpec,
}

impl Fixture {
    fn python(theme: &str, case: &'static str) -> Self {
        Self {
            path: "/case.py",
            text: format!("{DRIVER}\n\n{theme}\n\nmain()\n"),
            build: ":",
            gears: Gears::default(),
            spec: SandboxSpec::default(),
            argv: vec![PYTHON, "/case.py", case],
        }
    }

    fn native(case: &'static str) -> Self {
        Self {
            path: "/case.c",
            text: include_str!("../programs/native.c").to_owned(),
            gears: Gears::default(),
            spec: SandboxSpec::default(),
            build: "cc -O1 -o /case /case.c -lpthread -lm",
            argv: vec!["/case", case],
        }
    }

    fn begin(&self, sandbox: &Sandbox) -> Outcome<Program> {
        write_file(sandbox, self.path, self.text.as_bytes());
        output(sandbox, self.build);
        let mut program = Program::start(sandbox, &self.argv)?;
        match program.hear()?.as_str() {
            "ready" => Ok(program),
            other => Err(format!("{other:?} instead of ready")),
        }
    }

    /// Runs the case in every mode and tells of all that failed.
    fn all_modes(&self) {
        let failures: Vec<String> = match Subject::new(self) {
            Err(e) => vec![e],
            Ok(subject) => subject
                .modes()
                .into_iter()
                .filter_map(|(mode, outcome)| outcome.err().map(|e| format!("{mode}: {e}")))
                .collect(),
        };
        assert!(failures.is_empty(), "\n{}", failures.join("\n"));
    }
}

/// A case that stands ready in a sandbox, with a checkpoint of it.
struct Subject {
    lab: Lab,
    sandbox: std::sync::Arc<Sandbox>,
    program: Program,
    /// Where its output ended at the checkpoint.
    mark: u64,
    checkpoint: CheckpointId,
}

impl Subject {
    fn new(fixture: &Fixture) -> Outcome<Self> {
        let lab = Lab::with(fixture.gears);
        let sandbox = || lab.create(fixture.spec.clone());
        fixture
            .begin(&sandbox())?
            .pass("check")
            .map_err(|e| format!("untouched: {e}"))?;
        let sandbox = sandbox();
        let program = fixture.begin(&sandbox)?;
        // A program is another after it was stopped once: calls that it waits in go on by what the kernel has noted.
        let [_, report] = [(); 2].map(|()| sandbox.checkpoint(None));
        let report = report.map_err(|e| format!("checkpoint: {e}"))?;
        Ok(Self {
            lab,
            sandbox,
            mark: program.mark(),
            program,
            checkpoint: report.id,
        })
    }

    fn modes(mut self) -> [(&'static str, Outcome); 5] {
        [
            ("continued", self.program.pass("check")),
            ("undone in place", self.undone()),
            ("rebuilt", self.rebuilt()),
            ("forked", self.forked()),
            ("restored after a restart", self.restarted()),
        ]
    }

    /// Nothing that these programs do to themselves needs more than their own processes to be made again.
    fn roll_back(&mut self) -> Outcome {
        let report = self
            .sandbox
            .rollback(self.checkpoint)
            .map_err(|e| format!("rollback: {e}"))?;
        self.program.went_back(self.mark);
        match report.fallback {
            Some(why) => Err(format!("everything was built again, for {why}")),
            None => Ok(()),
        }
    }

    fn undone(&mut self) -> Outcome {
        self.roll_back().map_err(|e| format!("unspoiled, {e}"))?;
        let mutated = self.program.pass("mutate");
        self.roll_back()?;
        mutated.map_err(|e| format!("mutate: {e}"))?;
        let length = self.program.session.info().output;
        if length != self.mark {
            return Err(format!("the log has {length} bytes, not {}", self.mark));
        }
        self.program.pass("check")
    }

    fn rebuilt(&mut self) -> Outcome {
        self.program.kill()?;
        self.roll_back()?;
        self.program.pass("check")
    }

    fn forked(&mut self) -> Outcome {
        for fork in self.lab.fork(&self.sandbox, self.checkpoint, 2)? {
            self.program.in_fork(&fork, self.mark)?.pass("check")?;
        }
        Ok(())
    }

    /// The host ends, and another one makes the sandbox of what is on disk.
    fn restarted(self) -> Outcome {
        let id = self.program.session.info().id;
        let name = self.sandbox.name().to_owned();
        let persisted = self.sandbox.persist(self.checkpoint);
        persisted.map_err(|e| format!("persist: {e}"))?;
        drop((self.sandbox, self.program));
        let lab = self.lab.restarted();
        let sandbox = lab.host.get(&name).map_err(|e| e.to_string())?;
        let report = sandbox.rollback(self.checkpoint);
        let report = report.map_err(|e| format!("rollback: {e}"))?;
        if let Some(why) = report.fallback {
            return Err(format!("everything was built again, for {why}"));
        }
        Program::found(&sandbox, id, self.mark)?.pass("check")
    }
}

/// One test for each case of a theme, and one that the list is complete.
macro_rules! theme {
    ($theme:ident: $($case:ident)*) => {
        mod $theme {
            const SOURCE: &str = include_str!(concat!("../programs/", stringify!($theme), ".py"));

            $(#[test]
            fn $case() {
                super::Fixture::python(SOURCE, stringify!($case)).all_modes();
            })*

            #[test]
            fn no_case_is_left_out() {
                let listed = [$(stringify!($case)),*];
                assert_eq!(super::names(SOURCE), listed);
            }
        }
    };
}

/// The cases of a theme, in order.
fn names(source: &str) -> Vec<&str> {
    source
        .split("@case\ndef ")
        .skip(1)
        .map(|rest| rest.split('(').next().unwrap_or_default())
        .collect()
}

theme! { files:
    file_offset_flags_and_content
    file_unlinked_but_open
    file_among_very_many_that_change
    file_whose_name_was_taken_by_another
    directory_that_was_removed_and_stays_open
    directory_that_was_removed_open_and_worked_in
    file_renamed_since
    directory_position
    pipe_contents
    pipe_of_packets
    pipe_whose_other_end_was_closed
    pipe_ends_closed_since
    pipe_between_children
    fifo
    offset_shared_by_dup_and_fork
    description_held_by_the_child_alone
    descriptors_redirected
    standard_streams_redirected_since
    many_descriptors
    locks_held
    locks_for_reading_and_of_descriptions
    files_of_sysfs
    leases
    path_descriptor_and_proc_file
    what_proc_has_of_threads_that_live_and_that_have_ended
    what_proc_has_of_one_that_ends_later
    namespaces_and_what_proc_has_of_the_dead
    what_proc_has_of_a_zombie
    what_proc_has_of_a_process_that_runs_another_program_since
    what_proc_has_of_one_that_has_lost_its_parent_since
    what_proc_has_of_the_dead_read_in_part
    working_directory_in_what_proc_has_of_a_thread
    what_the_kernel_shows_to_those_inside
    standard_streams_opened_once_more
}

theme! { sockets:
    socketpair_stream_with_queued_data
    socketpair_shut_down_one_way
    socketpair_whose_peer_was_closed
    socketpair_dgram_with_queued_messages
    socketpair_seqpacket_with_queued_messages
    unix_listener_and_connection
    unix_listener_with_an_abstract_name
    unix_dgram_with_senders
    tcp_listening
    tcp6_listening
    tcp_established_with_queued_data
    tcp_idle_connection_closed_since
    tcp_half_closed
    unix_socket_whose_directory_is_gone
    tcp_ended_by_both_sides
    options_and_a_foreign_address
    a_queue_larger_than_the_buffer_of_a_new_socket
    udp_with_queued_datagrams
    udp_shut_down
    filter_of_what_is_received
    filter_that_is_locked
    raw_and_packet_sockets
    unix_sockets_whose_names_were_taken_by_others
    tcp_with_a_port_that_is_shared
    unix_connections_that_wait_with_data
    unix_packets_that_wait_with_their_connection
    tcp_connections_that_wait_with_data
    tcp6_connections_that_wait_with_data
    unix_peers_are_who_they_were
    tcp_shut_down_for_reading
    netlink_as_the_c_library_uses_it
    unix_listeners_whose_files_have_other_names
    socketpair_dgram_of_which_one_has_a_name
    datagrams_whose_senders_are_gone_or_send_elsewhere
    udp_whose_senders_are_gone_or_send_elsewhere
    unix_sockets_renamed_since_they_were_bound
    unix_sockets_whose_peers_are_gone
    more_connections_wait_than_may
    unix_connections_from_another_root
    tcp_connected_to_itself
    kinds_of_timestamps_changed_since
    datagrams_from_before_it_was_connected
    more_datagrams_than_there_is_room_for_now
    connections_that_were_reset
    unix_connections_of_who_may_not_connect_any_more
}

theme! { flights:
    in_a_stream
    in_datagrams
    in_packets
    in_datagrams_to_a_name
    whose_sender_has_closed_its_end
    sockets_that_carry_others
    an_epoll_and_what_it_watches
    received_since
    kept_in_a_table_and_sent_since
    between_processes
}

theme! { events:
    eventfd_counter
    epoll_registrations
    epoll_edge_told_since
    epoll_of_a_descriptor_closed_since
    epoll_nested
    timerfd_armed_and_expired
    timerfd_periodic_goes_on
    signalfd_with_a_pending_signal
    inotify_watches
    memfd_shared_with_a_child
    memfd_sealed_since
    memfds_sealed_before
    memfd_that_is_executed
    memfd_that_is_being_executed
    pty_with_both_ends_inside
    pty_with_a_session_on_it
    pty_whose_foreground_group_ended_since
    device_nodes
    pty_with_lines_that_nobody_has_read
    pty_with_bytes_that_nobody_has_read
    pty_whose_master_is_closed
    signals_of_a_file_for_another_user
    signals_of_a_file_for_one_thread
    inotify_of_a_removed_directory
    dev_tty_in_another_session
    dev_tty_hung_up_since
    terminal_of_all_in_a_session
    terminal_given_up_since
    pty_whose_slave_side_is_closed
}

theme! { memory:
    heap_of_many_objects
    private_anonymous_memory
    pages_never_touched_stay_zero
    pages_dropped_since
    sparse_gigabyte
    huge_pages
    memory_unmapped_since
    memory_replaced_since
    memory_mapped_since_is_gone
    memory_moved_since
    memory_grown_and_shrunk_since
    protections
    machine_code_made_at_run_time
    file_mapped_private_with_written_pages
    file_mapped_shared
    file_mapped_and_unlinked
    anonymous_memory_shared_with_children
    memory_copied_on_write_between_processes
    program_break
    stack_grown_since
    segments_of_system_v
    advice_and_locks
    mappings_that_grow_beside_others
    memory_that_may_be_dropped
    guard_pages
    guard_pages_in_a_private_mapping_of_a_file
    guard_pages_in_a_shared_mapping_of_a_file
}

/// Cases once more, with everything done in the second gear.
macro_rules! second_gear {
    ($($theme:ident: $($case:ident)*;)*) => {
        mod second_gear {
            $($(#[test]
            fn $case() {
                let source = include_str!(concat!("../programs/", stringify!($theme), ".py"));
                let fixture = super::Fixture::python(source, stringify!($case));
                super::Fixture {
                    gears: super::LOW,
                    ..fixture
                }
                .all_modes();
            })*)*
        }
    };
}

/// Everything that can be is done in the second gear.
const LOW: Gears = Gears {
    protect: 1,
    sort_later: 1,
    snapshot: 1,
    ahead: 1,
    lazy: 1,
};

second_gear! {
    memory:
        heap_of_many_objects
        private_anonymous_memory
        pages_never_touched_stay_zero
        pages_dropped_since
        sparse_gigabyte
        huge_pages
        memory_unmapped_since
        memory_replaced_since
        memory_mapped_since_is_gone
        memory_moved_since
        memory_grown_and_shrunk_since
        machine_code_made_at_run_time
        file_mapped_private_with_written_pages
        anonymous_memory_shared_with_children
        memory_copied_on_write_between_processes
        program_break
        segments_of_system_v
        advice_and_locks;
    threads:
        eight_threads_that_wait
        threads_ended_and_born_since
        lock_waited_for_by_threads
        a_hundred_threads
        thread_of_a_child;
    calls:
        read_of_an_empty_pipe
        write_half_done_to_a_pipe
        poll_with_a_long_timeout;
}

theme! { threads:
    eight_threads_that_wait
    threads_ended_and_born_since
    lock_waited_for_by_threads
    signal_masks_of_threads
    threads_that_compute
    a_hundred_threads
    thread_of_a_child
    threads_of_a_process_that_gave_up_its_rights
    threads_of_different_users
    threads_with_signals_and_priorities_of_their_own
    mutex_whose_owner_ends
}

theme! { calls:
    read_of_an_empty_pipe
    write_to_a_full_pipe
    write_half_done_to_a_pipe
    poll_without_a_timeout
    poll_with_a_long_timeout
    poll_whose_time_runs_out
    nanosleep
    nanosleep_that_tells_what_is_left
    futex_wait_whose_time_runs_out
    futex_wait_until_a_time
    sigtimedwait_whose_time_runs_out
    clock_nanosleep_until_a_time
    nanosleep_that_goes_on
    select_with_a_timeout
    select_whose_time_runs_out
    epoll_wait_with_a_timeout
    epoll_wait_without_a_timeout
    epoll_wait_whose_time_runs_out
    futex_wait
    futex_wait_with_a_timeout
    wait4_for_a_child
    waitid_for_a_child
    sigtimedwait_with_a_timeout
    sigwaitinfo_without_a_timeout
    accept_of_a_unix_connection
    accept_of_a_tcp_connection
    recv_with_a_timeout
    recv_without_a_timeout
    lock_waited_for
    open_of_a_fifo
    read_of_an_eventfd
    read_of_an_inotify
    pause_in_a_child
    read_interrupted_by_a_handler_as_ever
}

theme! { signals:
    handlers
    mask_and_pending_signals
    queued_signals_with_values
    interval_timers
    interval_timer_that_ticks
    posix_timers
    timers_of_threads_that_have_ended
    timers_whose_signals_wait
    alternate_signal_stack
}

theme! { limits:
    no_more_processes_allowed
    no_more_threads_allowed_to_another_user
    descriptors_above_the_limit
    descriptors_limited_since
    memory_above_the_limit
    memory_limited_since
    locked_memory_above_the_limit
    queued_signals_above_the_limit
    timers_above_the_limit_of_signals
}

theme! { processes:
    working_directory_umask_and_name
    working_directories_in_proc
    resource_limits
    processes_that_may_have_no_more_descriptors
    credentials_of_another_user
    ids_for_files_and_sets_of_capabilities
    seccomp_filters_of_its_own
    waits_that_a_filter_does_not_let_the_kernel_go_on_with
    children_with_rights_that_their_parents_have_not
    settings_that_a_program_starts_with_and_changes
    credentials_dropped_since
    scheduling
    process_controls
    rights_and_priorities_of_one_process
    what_proc_tells_of_a_program
    zombie_not_yet_waited_for
    zombie_that_leads_a_group
    zombie_that_leads_a_session
    zombie_of_a_parent_that_gives_up_rights_since
    group_whose_leader_ended_since
    groups_that_those_have_left_whom_they_are_named_after
    stopped_process
    orphan_of_a_double_fork
    sessions_and_groups
    member_of_a_group_whose_leader_is_gone
    session_whose_leader_is_gone
    orphans_that_another_than_init_took
    child_of_before_its_parent_made_a_session
    child_killed_since
    child_left_a_zombie_since
    children_born_since
    child_executed_another_program_since
    itself_executed_another_program_since
    program_that_may_not_be_executed_any_more
    children_of_other_programs
    tree_of_ten_generations
    tree_killed_whole_since
    process_descriptor
    multiprocessing_pool
    descriptors_of_processes_that_ended
    root_directories_of_their_own
    semaphores_and_message_queues_of_system_v
    seccomp_filters_that_threads_share
}

/// There is no room for those that are there for a moment only when a state is given back.
#[test]
fn as_many_processes_as_there_may_be() {
    let source = include_str!("../programs/full.py");
    let fixture = Fixture {
        spec: SandboxSpec {
            pids: Some(12),
            ..SandboxSpec::default()
        },
        ..Fixture::python(source, "as_many_processes_as_there_may_be")
    };
    let lab = Lab::new();
    let warnings = lab.create(fixture.spec.clone()).info().warnings;
    match warnings.is_empty() {
        true => fixture.all_modes(),
        false => eprintln!("skipped: {warnings:?}"),
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn registers_of_a_thread_that_computes() {
    if std::arch::is_x86_feature_detected!("avx2") {
        Fixture::native("registers").all_modes();
    } else {
        eprintln!("this processor has no AVX2: nothing was tested");
    }
}

#[test]
fn a_deep_stack_with_data_in_every_frame() {
    Fixture::native("deep_stack").all_modes();
}

#[test]
fn a_large_bss_and_a_break_that_went_down() {
    Fixture::native("large_bss_and_lower_break").all_modes();
}
