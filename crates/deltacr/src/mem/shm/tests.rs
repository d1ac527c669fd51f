//! What the registry does with objects that nobody has mapped.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use super::*;
use crate::mem::PAGE;

fn memfd(name: &std::ffi::CStr) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    File::from(memfd_create(name, flags).unwrap())
}

fn captured(objects: &SharedObjects, file: &File) -> (ShmKey, SharedMemory) {
    let key = objects.capture_fd(file.as_fd()).unwrap();
    (key, objects.take())
}

fn contents(file: &File) -> Vec<u8> {
    let mut all = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut all, 0).unwrap();
    all
}

#[test]
fn a_memfd_gets_its_contents_and_size_back_in_place() {
    let store = PageStore::new();
    let objects = SharedObjects::new(Arc::clone(&store)).unwrap();
    let file = memfd(c"data");
    file.set_len(100 * PAGE + 10).unwrap();
    file.write_all_at(&[1; 5000], 3 * PAGE).unwrap();
    file.write_all_at(&[2; 10], 100 * PAGE).unwrap();
    let before = contents(&file);
    let (key, state) = captured(&objects, &file);
    assert_eq!(store.pages(), 3);

    file.write_all_at(&[9; 5], 4 * PAGE).unwrap();
    file.write_all_at(&[9; 5], 50 * PAGE).unwrap();
    let (_, later) = captured(&objects, &file);
    assert_eq!(store.pages(), 5, "what did not change is not stored twice");
    file.set_len(2 * PAGE).unwrap();
    let changed = later.objects[&key].size;
    assert_eq!(changed, 100 * PAGE + 10);
    objects.restore(&state).unwrap();
    assert_eq!(contents(&file), before);
    let again = File::from(objects.open(key, libc::O_RDONLY).unwrap());
    assert_eq!(contents(&again), before);
    drop((state, later));
    objects.take();
    assert_eq!(store.pages(), 0);
    assert!(objects.open(key, libc::O_RDWR).is_err());
}

#[test]
fn a_memfd_that_is_gone_is_made_anew_with_name_and_seals() {
    let store = PageStore::new();
    let objects = SharedObjects::new(Arc::clone(&store)).unwrap();
    let file = memfd(c"sealed thing");
    file.write_all_at(&[5; 6000], 0).unwrap();
    fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::SHRINK).unwrap();
    let before = contents(&file);
    let (key, state) = captured(&objects, &file);
    objects.restore(&state).unwrap();

    let elsewhere = SharedObjects::new(store).unwrap();
    elsewhere.restore(&state).unwrap();
    let new = File::from(elsewhere.open(key, libc::O_RDWR).unwrap());
    assert_ne!(
        new.metadata().unwrap().ino(),
        file.metadata().unwrap().ino()
    );
    assert_eq!(contents(&new), before);
    let seals = fcntl_get_seals(&new).unwrap();
    assert_eq!(seals, SealFlags::WRITE | SealFlags::SHRINK);
    let path = format!("/proc/self/fd/{}", new.as_raw_fd());
    let name = fs::read_link(path).unwrap();
    assert_eq!(name.to_str().unwrap(), "/memfd:sealed thing (deleted)");
}

#[test]
fn a_memfd_that_was_sealed_since_is_made_anew() {
    let objects = SharedObjects::new(PageStore::new()).unwrap();
    let file = memfd(c"x");
    file.write_all_at(&[5; 6000], 0).unwrap();
    let (key, state) = captured(&objects, &file);
    let before = contents(&file);
    file.write_all_at(&[6; 6000], 0).unwrap();
    fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
    objects.part_with_sealed(&state, |_| true).unwrap();
    let meta = file.metadata().unwrap();
    let other = objects.find(meta.dev(), meta.ino()).unwrap();
    assert_ne!(other, key, "what holds the sealed one holds another one");
    objects.restore(&state).unwrap();
    let new = File::from(objects.open(key, libc::O_RDWR).unwrap());
    assert_eq!(contents(&new), before);
    assert!(fcntl_get_seals(&new).unwrap().is_empty());
}

#[test]
fn seals_that_spare_mappings_are_added_when_all_is_mapped() {
    let store = PageStore::new();
    let objects = SharedObjects::new(Arc::clone(&store)).unwrap();
    let file = memfd(c"x");
    file.write_all_at(&[5; 6000], 0).unwrap();
    let seals = SealFlags::FUTURE_WRITE | SealFlags::SEAL;
    fcntl_add_seals(&file, seals).unwrap();
    let (key, state) = captured(&objects, &file);

    let elsewhere = SharedObjects::new(store).unwrap();
    elsewhere.restore(&state).unwrap();
    let new = File::from(elsewhere.open(key, libc::O_RDWR).unwrap());
    new.write_all_at(&[5; 6000], 0).unwrap();
    elsewhere.seal(&state).unwrap();
    assert_eq!(fcntl_get_seals(&new).unwrap(), seals);
    assert_eq!(contents(&new), contents(&file));

    let number = |file: &File| {
        let meta = file.metadata().unwrap();
        objects.find(meta.dev(), meta.ino())
    };
    objects.part_with_sealed(&state, |_| false).unwrap();
    assert_eq!(number(&file), Some(key), "nobody is to write to it");
    objects.part_with_sealed(&state, |_| true).unwrap();
    assert_ne!(number(&file), Some(key), "it cannot be mapped any more");
}

#[test]
fn a_memfd_that_was_resized_since_and_cannot_be_again_is_made_anew() {
    for (seal, size) in [(SealFlags::SHRINK, 3 * PAGE), (SealFlags::GROW, PAGE)] {
        let objects = SharedObjects::new(PageStore::new()).unwrap();
        let file = memfd(c"x");
        file.set_len(2 * PAGE).unwrap();
        fcntl_add_seals(&file, seal).unwrap();
        let (key, state) = captured(&objects, &file);
        file.set_len(size).unwrap();
        objects.part_with_sealed(&state, |_| true).unwrap();
        objects.restore(&state).unwrap();
        let new = File::from(objects.open(key, libc::O_RDWR).unwrap());
        assert_eq!(new.metadata().unwrap().len(), 2 * PAGE);
        assert_eq!(fcntl_get_seals(&new).unwrap(), seal);
    }
}

#[test]
fn a_segment_is_compared_with_what_was_known_of_it_and_not_kept_open() {
    let store = PageStore::new();
    let objects = SharedObjects::new(Arc::clone(&store)).unwrap();
    let file = memfd(c"stands for a segment");
    file.write_all_at(&[5; 3 * PAGE as usize], 0).unwrap();
    let show = |file: &File| objects.show_segment(7, file.try_clone().unwrap());
    let mut states = Vec::new();
    for changed in 0..2 {
        file.write_all_at(&[9; 5], changed * PAGE).unwrap();
        let key = show(&file).unwrap();
        objects.capture(key).unwrap();
        states.push(objects.take());
        assert!(objects.size(key).is_err(), "it is still open");
    }
    assert_eq!(store.pages(), 4);
    assert!(objects.restore(&states[0]).is_err(), "there is none");
    let another = memfd(c"has the same id");
    another.set_len(3 * PAGE).unwrap();
    show(&another).unwrap();
    objects.restore(&states[0]).unwrap();
    file.write_all_at(&[5; 5], PAGE).unwrap();
    assert_eq!(contents(&another), contents(&file));
    let huge = show(&File::open("/dev/null").unwrap()).unwrap_err();
    assert!(huge.to_string().contains("huge"));
}
