//! AVX-512 under Bochs: a machine whose only process is a test program, and whose serial port is our console.

use super::{LEVELS, SAMPLE, SUITES, build, call, install, output_of};
use anyhow::{Context, Result, bail};
use std::{
    fs,
    io::{Read, Write},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The release of Debian whose Bochs knows the processor; it builds on older ones.
const RELEASE: &str = "trixie";
/// Without what the kernel and Bochs differ on, none of it arithmetic.
const PROCESSOR: &str = "model=sapphire_rapids, exclude_features=\"amx, amx_int8, amx_bf16, uintr, serialize, waitpkg, pku, pks, cet, umip, la57\"";
/// What the kernel is told: where to write, and to leave what Bochs does its own way.
const KERNEL: &str = "console=ttyS0,115200 quiet panic=-1 reboot=t mitigations=off clearcpuid=fsrm,invpcid,pcid";
/// The rungs above what the machines that build this have.
const RUNGS: &str = "avxvnni,avx512,avx512vnni,avx512bf16";
/// Before the status that the program ended with.
const STATUS: &str = "status of the tests: ";
const MEMORY_MIB: usize = 1024;

pub fn emulate(only: &str) -> Result<()> {
    install(&["bochsbios", "vgabios", "isolinux", "syslinux-common", "genisoimage", "g++", "make", "dpkg-dev"])?;
    let folder = crate::root().join("target/emulate");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let bochs = bochs(&folder)?;
    let mut failed = Vec::new();
    for suite in SUITES {
        let program = build(suite, &[], &[])?;
        disk(&folder, &program, &format!("{SAMPLE}={} {LEVELS}={RUNGS}", suite.under_bochs), only)?;
        eprintln!("{} on a processor of Bochs", suite.package);
        if !run(&folder, &bochs)? {
            failed.push(suite.package);
        }
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

/// Bochs with all that x86 has, built from Debian's source once.
fn bochs(folder: &Path) -> Result<PathBuf> {
    let program = folder.join("bochs");
    if program.is_file() {
        return Ok(program);
    }
    // The sources come from where this machine's packages do.
    let site =
        output_of("apt-get", &["indextargets", "--format", "$(SITE)", "Created-By: Packages", "Origin: Debian"])?;
    let site = site.lines().next().context("apt knows no archive of Debian")?;
    let lists = folder.join("lists");
    fs::create_dir_all(lists.join("partial"))?;
    let key = "/usr/share/keyrings/debian-archive-keyring.gpg";
    let sources = folder.join("sources.list");
    fs::write(&sources, format!("deb-src [signed-by={key}] {site} {RELEASE} main\n"))?;
    let options = [
        format!("Dir::Etc::SourceList={}", sources.display()),
        "Dir::Etc::SourceParts=-".to_string(),
        format!("Dir::State::Lists={}", lists.display()),
        "APT::Sandbox::User=root".to_string(),
    ];
    let options: Vec<&str> = options.iter().flat_map(|option| ["-o", option]).collect();
    call("apt-get", &[&options[..], &["update", "--quiet"]].concat(), folder)?;
    call("apt-get", &[&options[..], &["source", "--quiet", "bochs"]].concat(), folder)?;
    let entries = fs::read_dir(folder)?.filter_map(|entry| Some(entry.ok()?.path()));
    let is_source = |path: &PathBuf| path.is_dir() && path.join("bochs.h").is_file();
    let source = entries.into_iter().find(is_source).context("the source of Bochs is not there")?;
    mend(&source)?;
    let features = ["--enable-x86-64", "--enable-cpu-level=6", "--enable-avx", "--enable-evex", "--enable-amx"];
    let rest = ["--enable-all-optimizations", "--enable-pci", "--disable-docbook", "--disable-plugins", "--with-nogui"];
    call("./configure", &[&features[..], &rest].concat(), &source)?;
    let jobs = std::thread::available_parallelism().map_or(1, |n| n.get());
    call("make", &["--silent", &format!("--jobs={jobs}")], &source)?;
    fs::copy(source.join("bochs"), &program)?;
    fs::remove_dir_all(&source)?;
    Ok(program)
}

/// `vdpbf16ps` reads a whole vector, so a short displacement counts in vectors; release 3.0 takes it for one that counts in words.
fn mend(source: &Path) -> Result<()> {
    let path = source.join("cpu/decoder/ia_opcodes_evex.def");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let mended = |line: &str| match line.contains("BX_IA_EVEX_VDPBF16PS_") {
        true => line.replace("OP_mVdq32", "OP_mVdq"),
        false => line.to_string(),
    };
    let lines: Vec<String> = text.lines().map(mended).collect();
    Ok(fs::write(&path, lines.join("\n") + "\n")?)
}

/// The file that `is_it` says of a package of Debian, unpacked here and not installed.
fn unpacked(folder: &Path, package: &str, inside: &str, is_it: fn(&str) -> bool) -> Result<PathBuf> {
    let to = folder.join(package);
    if !to.is_dir() {
        let downloads = folder.join(format!("{package}.deb"));
        fs::create_dir_all(&downloads)?;
        call("apt-get", &["download", "--quiet", "-o", "APT::Sandbox::User=root", package], &downloads)?;
        let file = fs::read_dir(&downloads)?.next().context("nothing was downloaded")??.path();
        call("dpkg-deb", &["--extract", &file.to_string_lossy(), &to.to_string_lossy()], folder)?;
        fs::remove_dir_all(&downloads)?;
    }
    let names = fs::read_dir(to.join(inside))?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let name =
        names.into_iter().find(|name| is_it(name)).with_context(|| format!("{package} lacks a file in {inside}"))?;
    Ok(to.join(inside).join(name))
}

/// The disk that the machine boots from: a kernel, and the files that it finds.
fn disk(folder: &Path, program: &Path, environment: &str, only: &str) -> Result<()> {
    // Debian's kernel for virtual machines: the package of its newest version is what this one depends on.
    let depends = output_of("apt-cache", &["depends", "--important", "linux-image-cloud-amd64"])?;
    let package =
        depends.lines().find_map(|line| line.trim().strip_prefix("Depends: ")).context("apt knows no kernel")?;
    let kernel = unpacked(folder, package, "boot", |name| name.starts_with("vmlinuz"))?;
    let disk = folder.join("disk");
    fs::create_dir_all(disk.join("isolinux"))?;
    fs::copy(kernel, disk.join("vmlinuz"))?;
    fs::copy("/usr/lib/ISOLINUX/isolinux.bin", disk.join("isolinux/isolinux.bin"))?;
    fs::copy("/usr/lib/syslinux/modules/bios/ldlinux.c32", disk.join("isolinux/ldlinux.c32"))?;
    let menu = format!("default test\nlabel test\n kernel /vmlinuz\n append initrd=/files.img rdinit=/init {KERNEL}\n");
    fs::write(disk.join("isolinux/isolinux.cfg"), menu)?;
    fs::write(disk.join("files.img"), files(folder, program, environment, only)?)?;
    let boot = ["-b", "isolinux/isolinux.bin", "-c", "isolinux/boot.cat", "-no-emul-boot", "-boot-load-size", "4"];
    call("genisoimage", &[&["-quiet", "-o", "disk.iso", "-boot-info-table"], &boot[..], &["disk"]].concat(), folder)
}

/// The files of the machine: the program, the libraries it asks for, a console, and a shell that runs the program and ends the machine.
fn files(folder: &Path, program: &Path, environment: &str, only: &str) -> Result<Vec<u8>> {
    let stripped = folder.join("test");
    let (from, to) = (program.to_string_lossy(), stripped.to_string_lossy());
    call("strip", &["-o", &to, &from], folder)?;
    let shell = unpacked(folder, "busybox-static", "bin", |name| name == "busybox")?;
    // What the program wrote last is on its way through the serial port when it ends.
    let script = format!(
        "#!/bin/busybox sh\n/bin/busybox mount -t proc proc /proc\n{environment} /test --test-threads=1 {only}\n\
         echo \"{STATUS}$?\"\n/bin/busybox sleep 1\n/bin/busybox reboot -f\n"
    );
    let mut archive = Archive::default();
    for name in ["/tmp", "/proc", "/dev", "/bin"] {
        archive.folder(Path::new(name));
    }
    archive.add("/dev/console", 0o020_600, &[], (5, 1));
    for (name, bytes) in
        [("/bin/busybox", fs::read(shell)?), ("/init", script.into_bytes()), ("/test", fs::read(&stripped)?)]
    {
        archive.add(name, 0o100_755, &bytes, (0, 0));
    }
    for library in output_of("ldd", &[&from])?.split_whitespace().filter(|word| word.starts_with('/')) {
        archive.folder(Path::new(library).parent().context("a library without a folder")?);
        archive.add(library, 0o100_755, &fs::read(library)?, (0, 0));
    }
    Ok(archive.finish())
}

/// An archive in the "new ASCII" format of cpio, which is what the kernel reads (its documentation, `buffer-format`).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    folders: Vec<PathBuf>,
}

impl Archive {
    fn folder(&mut self, path: &Path) {
        for folder in path.ancestors().collect::<Vec<_>>().into_iter().rev().skip(1) {
            if !self.folders.iter().any(|known| known == folder) {
                self.folders.push(folder.to_path_buf());
                self.add(&folder.to_string_lossy(), 0o040_755, &[], (0, 0));
            }
        }
    }

    fn add(&mut self, path: &str, mode: u32, data: &[u8], (major, minor): (u32, u32)) {
        let name = format!("{}\0", path.trim_start_matches('/'));
        let inode = self.bytes.len() as u32;
        let (size, length) = (data.len() as u32, name.len() as u32);
        self.bytes.extend(b"070701");
        for field in [inode, mode, 0, 0, 1, 0, size, 0, 0, major, minor, length, 0] {
            self.bytes.extend(format!("{field:08x}").into_bytes());
        }
        for part in [name.as_bytes(), data] {
            self.bytes.extend(part);
            self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        }
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[], (0, 0));
        self.bytes
    }
}

/// Boots the machine and prints what it writes; whether the program ended well.
fn run(folder: &Path, bochs: &Path) -> Result<bool> {
    let port = TcpListener::bind("127.0.0.1:0").context("cannot listen to the serial port")?;
    let settings = format!(
        "display_library: nogui\n\
         cpu: {PROCESSOR}, count=1, ips=50000000, reset_on_triple_fault=0\n\
         memory: guest={MEMORY_MIB}, host={MEMORY_MIB}\n\
         romimage: file=/usr/share/bochs/BIOS-bochs-latest\n\
         vgaromimage: file=/usr/share/vgabios/vgabios.bin\n\
         ata0-master: type=cdrom, path=disk.iso, status=inserted\n\
         boot: cdrom\n\
         com1: enabled=1, mode=socket-client, dev=localhost:{}\n\
         clock: sync=none\n\
         log: bochs.log\n\
         panic: action=fatal\n",
        port.local_addr()?.port(),
    );
    fs::write(folder.join("bochsrc"), settings)?;
    let mut child = Command::new(bochs)
        .args(["-q", "-f", "bochsrc"])
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start Bochs")?;
    // It connects before anything else, or ends.
    port.set_nonblocking(true)?;
    let mut serial = loop {
        match port.accept() {
            Ok((serial, _)) => break serial,
            Err(_) if child.try_wait()?.is_some() => {
                bail!("Bochs did not start: {}", folder.join("bochs.log").display())
            }
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(50)),
        }
    };
    serial.set_nonblocking(false)?;
    let (mut said, mut part) = (Vec::new(), [0; 4096]);
    loop {
        let count = serial.read(&mut part)?;
        if count == 0 {
            break;
        }
        said.extend(&part[..count]);
        std::io::stdout().write_all(&part[..count])?;
        std::io::stdout().flush()?;
    }
    child.wait()?;
    println!();
    let said = String::from_utf8_lossy(&said);
    let status = said.lines().find_map(|line| line.strip_prefix(STATUS));
    Ok(status.context("the tests did not end")?.trim() == "0")
}
