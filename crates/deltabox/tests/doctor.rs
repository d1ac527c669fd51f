//! What is said about the kernel.

#[test]
fn every_required_feature_is_found_where_the_other_tests_pass_and_nothing_is_left() {
    let features = deltabox::Host::doctor();
    for feature in &features {
        assert!(!feature.detail.is_empty());
        assert!(
            feature.present || !feature.required,
            "{}: {}",
            feature.name,
            feature.detail
        );
    }
    assert!(features.len() >= 12);
    let mine = format!("deltabox-doctor-{}", std::process::id());
    assert!(!std::env::temp_dir().join(&mine).exists());
    let hierarchies = std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten();
    for hierarchy in hierarchies {
        assert!(!hierarchy.path().join(&mine).exists());
        assert_ne!(hierarchy.file_name().to_string_lossy(), mine);
    }
}
