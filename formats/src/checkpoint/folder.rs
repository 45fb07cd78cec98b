//! The folder: which files belong to it, which tensors they hold, and how the canonical ones are read from them.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::config::{self, Config, excerpt};
use super::names;
use super::quantized::{Matrix, Recent};
use super::shard::{Entries, MAX_JSON, Shard, Stored, duplicates};
use super::values;
use super::{Layout, Options};
use crate::canonical::Source;
use crate::model_bin::header::ModelHeader;
use crate::model_bin::tensors::{Dims, TensorId, TensorKind};
use crate::progress::Progress;
use crate::rules::Rule;
use crate::violation::{Error, Result, Violation};
use crate::vocabulary::{self, Vocabulary};

const INDEX: &str = "model.safetensors.index.json";
const SUFFIX: &str = ".safetensors";
/// Bytes of a config: it is parsed whole, into many times its size, and real ones have two thousand.
const MAX_CONFIG: u64 = 1 << 20;
/// Missing tensors are listed up to this number: a config may demand any number of blocks.
const MAX_MISSING: usize = 64;
/// Unexpected tensors and other files are listed up to this number.
const MAX_NOTED: usize = 16;

/// A checkpoint whose headers and config are sound.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    layout: Layout,
    notes: Vec<String>,
    header: ModelHeader,
    dims: Dims,
    vocabulary: Vocabulary,
    shards: Vec<Shard>,
    tensors: HashMap<TensorId, Origin>,
    recent: Recent,
}

/// Where a canonical tensor comes from.
#[derive(Debug)]
enum Origin {
    /// The bytes of these tensors, one behind the other.
    Parts(Vec<Part>),
    /// MXFP4 blocks or scales made from a BF16 tensor `[experts, columns, rows]`.
    Transposed(Part),
}

/// A stored tensor.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) name: String,
    pub(super) shape: Vec<u64>,
    /// Its bytes, from the start of the shard.
    pub(super) range: Range<u64>,
    shard: usize,
}

impl Folder {
    /// Opens a checkpoint: reads the config and the headers of all shards, and no tensor.
    ///
    /// # Errors
    /// [`Error::Invalid`] with every violation of a `SRC-*` rule that can be seen without reading tensors;
    /// [`Error::Io`] where a file or folder cannot be read.
    pub fn open(dir: &Path, options: Options) -> Result<Folder> {
        let mut scan = Scan::new(dir)?;
        let config = scan.config()?;
        scan.shards()?;
        let Scan { shards, mut violations, mut notes, index, unreadable, excused, .. } = scan;
        let catalogue = catalogue(&shards, &mut violations);
        if let Some(index) = &index {
            disagreements(index, &shards, &catalogue, &mut violations);
        }
        let layout = layout(&catalogue, unreadable, &mut violations);

        let header = config.as_ref().map(Config::unchecked_header);
        if let Some(Err(broken)) = config.as_ref().map(Config::header) {
            violations.extend(broken);
        }
        let dims = header.as_ref().and_then(|header| match Dims::new(header, options.vocabulary.len()) {
            Ok(dims) => Some(dims),
            Err(unlayable) => {
                violations.push(Violation {
                    rule: Rule::SourceConfig,
                    section: config::FILE.into(),
                    field: "num_hidden_layers".into(),
                    range: 0..0,
                    found: format!("{} with {}", header.num_blocks, unlayable.found),
                    needed: unlayable.needed.into(),
                });
                None
            }
        });
        let mut tensors = HashMap::new();
        if let (Some(dims), Some(layout)) = (dims, layout) {
            let mut resolver = Resolver {
                layout,
                dims,
                shards: &shards,
                catalogue: &catalogue,
                excused: &excused,
                report_missing: !unreadable,
                used: HashSet::new(),
                missing: 0,
                bf16: Vec::new(),
                violations: &mut violations,
            };
            tensors = resolver.resolve();
            resolver.refuse_bf16(options.quantize);
            resolver.note_unused(&mut notes);
        }
        match (header, dims, layout) {
            (Some(header), Some(dims), Some(layout)) if violations.is_empty() => Ok(Folder {
                path: dir.into(),
                layout,
                notes,
                header,
                dims,
                vocabulary: options.vocabulary,
                shards: shards.into_iter().map(|(shard, _)| shard).collect(),
                tensors,
                recent: Recent::default(),
            }),
            _ => Err(Error::Invalid { path: dir.into(), violations }),
        }
    }

    /// Which names and which form of experts the checkpoint has.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is unusual but no reason to refuse: files and tensors that are ignored.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    fn shard(&self, part: &Part) -> Result<&Shard> {
        self.shards
            .get(part.shard)
            .ok_or_else(|| Error::Unsupported(format!("{} lies in no shard", part.name)))
    }

    fn read_parts(&self, parts: &[Part], mut offset: u64, mut out: &mut [u8]) -> Result<()> {
        for part in parts {
            let len = part.range.end - part.range.start;
            if offset >= len {
                offset -= len;
                continue;
            }
            let (now, later) = out.split_at_mut(out.len().min((len - offset) as usize));
            self.shard(part)?.read_at(now, part.range.start + offset)?;
            (out, offset) = (later, 0);
            if out.is_empty() {
                break;
            }
        }
        Ok(())
    }

    fn read_quantized(&self, id: TensorId, part: &Part, rows: Range<u64>, out: &mut [u8]) -> Result<()> {
        let &[_, columns, rows_of_expert] = part.shape.as_slice() else {
            return Err(Error::Unsupported(format!("{} does not have three axes", part.name)));
        };
        let row_bytes = id.kind.row_bytes(&self.dims) as usize;
        let mut matrix: Option<(u64, Arc<Matrix>)> = None;
        for (row, out) in rows.zip(out.chunks_exact_mut(row_bytes)) {
            let (expert, row) = (row / rows_of_expert, (row % rows_of_expert) as usize);
            let current = match matrix.take().filter(|(other, _)| *other == expert) {
                Some((_, current)) => current,
                None => self.quantized(part, expert, columns, rows_of_expert)?,
            };
            if id.kind.is_scales() {
                current.copy_scales(row, out)
            } else {
                current.copy_blocks(row, out)
            }
            matrix = Some((expert, current));
        }
        Ok(())
    }

    fn quantized(&self, part: &Part, expert: u64, columns: u64, rows: u64) -> Result<Arc<Matrix>> {
        let bytes = columns * rows * 2;
        let start = part.range.start + expert * bytes;
        let shard = self.shard(part)?;
        self.recent.get((part.shard, start..start + bytes), || {
            let read = |out: &mut [u8], offset: u64| shard.read_at(out, start + offset);
            let made = Matrix::quantize(rows as usize, columns as usize, read)?;
            made.map_err(|not_finite| Error::Invalid {
                path: self.path.clone(),
                violations: vec![values::violation(
                    values::Test::Finite,
                    part,
                    &shard.name,
                    &[(expert * columns * rows + not_finite.element, not_finite.bytes)],
                    1,
                )],
            })
        })
    }
}

impl Source for Folder {
    fn header(&self) -> &ModelHeader {
        &self.header
    }

    fn dims(&self) -> &Dims {
        &self.dims
    }

    fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    fn read_rows(&self, tensor: TensorId, rows: Range<u64>, out: &mut [u8]) -> Result<()> {
        let row_bytes = tensor.kind.row_bytes(&self.dims);
        let count = rows.end.checked_sub(rows.start).filter(|_| rows.end <= tensor.kind.rows(&self.dims));
        if count.and_then(|count| count.checked_mul(row_bytes)) != Some(out.len() as u64) {
            return Err(Error::Unsupported(format!("rows {rows:?} of {tensor} into {} bytes", out.len())));
        }
        match self.tensors.get(&tensor) {
            Some(Origin::Parts(parts)) => self.read_parts(parts, rows.start * row_bytes, out),
            Some(Origin::Transposed(part)) => self.read_quantized(tensor, part, rows, out),
            None => Err(Error::Unsupported(format!("the model has no tensor {tensor}"))),
        }
    }

    /// All MXFP4 scales, all Q, K and V weights and biases, and all BF16 experts, in the order of the file that would be
    /// written. Uses several threads, each with a buffer of a few megabytes.
    fn check_values(&self, progress: &dyn Progress) -> Result<()> {
        let mut tests = Vec::new();
        for id in self.dims.tensors() {
            match self.tensors.get(&id) {
                Some(Origin::Parts(parts)) if id.kind.is_scales() => {
                    tests.extend(parts.iter().map(|part| (part, values::Test::Scale)));
                }
                Some(Origin::Parts(parts)) if id.kind.is_qkv() => {
                    tests.extend(parts.iter().map(|part| (part, values::Test::NotNan)));
                }
                Some(Origin::Transposed(part)) if !id.kind.is_scales() => {
                    tests.push((part, values::Test::Finite))
                }
                _ => {}
            }
        }
        let violations = values::check(&tests, |part| self.shard(part), progress)?;
        if violations.is_empty() {
            Ok(())
        } else {
            Err(Error::Invalid { path: self.path.clone(), violations })
        }
    }
}

/// A shard and the tensors that its header lists.
type Listed = (Shard, Vec<(String, Stored)>);

/// Where each tensor is: the number of its shard, and the header's entry.
type Catalogue<'a> = HashMap<&'a str, (usize, &'a Stored)>;

#[derive(Deserialize)]
struct Index {
    weight_map: Entries<String>,
}

/// What the folder's files yield.
struct Scan<'a> {
    dir: &'a Path,
    /// Where files may lie, without symbolic links: the folder, and the store of a Hugging Face cache that it belongs to.
    roots: Vec<PathBuf>,
    shards: Vec<Listed>,
    index: Option<Vec<(String, String)>>,
    violations: Vec<Violation>,
    notes: Vec<String>,
    /// A shard could not be read and no index says what it holds, so nothing can be called missing.
    unreadable: bool,
    /// Tensors that the index places in a shard that could not be read.
    excused: HashSet<String>,
}

/// Hugging Face's cache holds a checkpoint as `models--OWNER--NAME/snapshots/REVISION`, a folder of links into
/// `models--OWNER--NAME/blobs`. Links into that one folder are as safe as files.
fn cache_store(snapshot: &Path) -> Option<PathBuf> {
    let snapshots = snapshot.parent().filter(|parent| parent.ends_with("snapshots"))?;
    let model = snapshots.parent()?;
    let named = model.file_name()?.to_str()?.starts_with("models--");
    named.then(|| fs::canonicalize(model.join("blobs")).ok().filter(|store| store.starts_with(model)))?
}

impl<'a> Scan<'a> {
    fn new(dir: &'a Path) -> Result<Scan<'a>> {
        let root = fs::canonicalize(dir).map_err(Error::io(dir))?;
        Ok(Scan {
            dir,
            roots: cache_store(&root).into_iter().chain([root]).collect(),
            shards: Vec::new(),
            index: None,
            violations: Vec::new(),
            notes: Vec::new(),
            unreadable: false,
            excused: HashSet::new(),
        })
    }

    fn refuse(&mut self, rule: Rule, section: &str, field: &str, found: impl Into<String>, needed: &str) {
        self.violations.push(Violation {
            rule,
            section: section.into(),
            field: field.into(),
            range: 0..0,
            found: found.into(),
            needed: needed.into(),
        });
    }

    /// The path of a file of the folder; `None`, and a violation of `rule` or `SRC-CONTAINER`, where there is none.
    fn file(&mut self, name: &str, rule: Rule) -> Result<Option<PathBuf>> {
        let mut components = Path::new(name).components();
        let plain = matches!(components.next(), Some(Component::Normal(first)) if first == name);
        if !plain || components.next().is_some() || name.contains(['\0', '\\']) {
            self.refuse(
                Rule::SourceContainer,
                INDEX,
                &excerpt(name),
                "a path",
                "the plain name of a file in the folder",
            );
            return Ok(None);
        }
        let path = self.dir.join(name);
        let resolved = match fs::canonicalize(&path) {
            Ok(resolved) => resolved,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.refuse(rule, name, name, "no such file", "the file");
                return Ok(None);
            }
            Err(error) => return Err(Error::Io { path, source: error }),
        };
        if !self.roots.iter().any(|root| resolved.starts_with(root)) {
            let found = format!("a symbolic link to {}", resolved.display());
            let needed = "a file inside the folder (`cp -rL` copies a folder with what its links lead to)";
            self.refuse(Rule::SourceContainer, name, name, found, needed);
            return Ok(None);
        }
        if !fs::metadata(&resolved).map_err(Error::io(&path))?.is_file() {
            self.refuse(Rule::SourceContainer, name, name, "no regular file", "a regular file");
            return Ok(None);
        }
        Ok(Some(path))
    }

    fn json(&mut self, name: &str, rule: Rule, limit: u64) -> Result<Option<Vec<u8>>> {
        let Some(path) = self.file(name, rule)? else {
            return Ok(None);
        };
        let len = fs::metadata(&path).map_err(Error::io(&path))?.len();
        if len > limit {
            self.refuse(rule, name, name, format!("{len} bytes"), &format!("at most {limit} bytes of JSON"));
            return Ok(None);
        }
        fs::read(&path).map(Some).map_err(Error::io(path))
    }

    fn config(&mut self) -> Result<Option<Config>> {
        let Some(text) = self.json(config::FILE, Rule::SourceConfig, MAX_CONFIG)? else {
            return Ok(None);
        };
        let (config, violations) = Config::read(&text);
        self.violations.extend(violations);
        Ok(config)
    }

    fn shards(&mut self) -> Result<()> {
        let (files, others) = listing(self.dir)?;
        let has_index = others.iter().any(|name| name == INDEX);
        let companions = [config::FILE, INDEX, vocabulary::FILE_NAME];
        let ignored: Vec<&str> =
            others.iter().map(String::as_str).filter(|name| !companions.contains(name)).collect();
        note_some(&mut self.notes, "ignored beside the checkpoint", &ignored);

        if has_index && let Some(text) = self.json(INDEX, Rule::SourceContainer, MAX_JSON)? {
            match serde_json::from_slice::<Index>(&text) {
                Ok(Index { weight_map: Entries(entries) }) => self.index = Some(entries),
                Err(error) => {
                    let needed = "a JSON object with weight_map, file names by tensor name";
                    self.refuse(Rule::SourceContainer, INDEX, "weight_map", error.to_string(), needed);
                }
            }
        }
        let Some(index) = self.index.take() else {
            if files.is_empty() {
                let original = listing(&self.dir.join("original")).is_ok_and(|(files, _)| !files.is_empty());
                let found = if original { "none here, but some in the sub-folder original" } else { "none" };
                let needed = if original {
                    "the folder that holds them: name original itself"
                } else {
                    "at least one"
                };
                self.refuse(Rule::SourceMissing, "*.safetensors", "SafeTensors files", found, needed);
                self.unreadable = true;
            }
            for name in &files {
                let opened = self.open(name)?;
                self.unreadable |= !opened;
            }
            return Ok(());
        };

        let named: BTreeSet<&str> = index.iter().map(|(_, file)| file.as_str()).collect();
        let mut failed = HashSet::new();
        for &name in &named {
            if !self.open(name)? {
                failed.insert(name);
            }
        }
        for (tensor, file) in &index {
            if failed.contains(file.as_str()) {
                self.excused.insert(tensor.clone());
            }
        }
        let strays: Vec<&str> =
            files.iter().map(String::as_str).filter(|name| !named.contains(name)).collect();
        self.strays(&strays)?;
        self.index = Some(index);
        Ok(())
    }

    /// Opens a shard; `false`, and violations, where it is unsound.
    fn open(&mut self, name: &str) -> Result<bool> {
        let Some(path) = self.file(name, Rule::SourceMissing)? else {
            return Ok(false);
        };
        match Shard::open(&path, name) {
            Ok(listed) => self.shards.push(listed),
            Err(Error::Invalid { violations, .. }) => {
                self.violations.extend(violations);
                return Ok(false);
            }
            Err(error) => return Err(error),
        }
        Ok(true)
    }

    /// SafeTensors files that the index does not name: a second copy of a tensor leaves open which one is meant,
    /// anything else is ignored.
    fn strays(&mut self, names: &[&str]) -> Result<()> {
        let mut ignored = Vec::new();
        for &name in names {
            let opened = match self.file(name, Rule::SourceMissing)? {
                Some(path) => Shard::open(&path, name),
                None => continue,
            };
            let tensors: HashSet<String> = match opened {
                Ok((_, tensors)) => tensors.into_iter().map(|(tensor, _)| tensor).collect(),
                Err(Error::Invalid { .. }) => HashSet::new(),
                Err(error) => return Err(error),
            };
            let twice = self.shards.iter().find_map(|(shard, held)| {
                held.iter()
                    .find(|(tensor, _)| tensors.contains(tensor))
                    .map(|(tensor, stored)| (shard, tensor, stored))
            });
            match twice {
                Some((shard, tensor, stored)) => {
                    let violation = duplicate(tensor, (&shard.name, stored), name);
                    self.violations.push(violation);
                }
                None => ignored.push(name),
            }
        }
        note_some(&mut self.notes, "not named by the index and ignored", &ignored);
        Ok(())
    }
}

/// The names of the folder's SafeTensors files, and of its other files; each sorted.
fn listing(dir: &Path) -> Result<(Vec<String>, Vec<String>)> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let entry = entry.map_err(Error::io(dir))?;
        let is_dir = entry.file_type().map_err(Error::io(dir))?.is_dir();
        let name = entry.file_name().to_string_lossy().into_owned();
        if !is_dir || name.ends_with(SUFFIX) {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names.into_iter().partition(|name| name.ends_with(SUFFIX)))
}

fn note_some(notes: &mut Vec<String>, what: &str, names: &[&str]) {
    if names.is_empty() {
        return;
    }
    let shown: Vec<String> = names.iter().take(MAX_NOTED).map(|name| excerpt(name)).collect();
    let more = names.len().saturating_sub(MAX_NOTED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    notes.push(format!("{what}: {}{more}", shown.join(", ")));
}

fn duplicate(tensor: &str, (file, stored): (&str, &Stored), other: &str) -> Violation {
    Violation {
        rule: Rule::SourceDuplicate,
        section: file.into(),
        field: tensor.into(),
        range: stored.range.clone(),
        found: format!("the tensor in {file} and in {other}"),
        needed: "one of them".into(),
    }
}

fn catalogue<'a>(shards: &'a [Listed], violations: &mut Vec<Violation>) -> Catalogue<'a> {
    let mut catalogue = Catalogue::new();
    for (number, (shard, tensors)) in shards.iter().enumerate() {
        for (name, stored) in tensors {
            if let Some((first, _)) = catalogue.get(name.as_str())
                && let Some((other, _)) = shards.get(*first)
            {
                violations.push(duplicate(name, (&shard.name, stored), &other.name));
            }
            catalogue.insert(name, (number, stored));
        }
    }
    catalogue
}

/// Entries of the index that are not true of the shards.
fn disagreements(
    index: &[(String, String)],
    shards: &[Listed],
    catalogue: &Catalogue,
    violations: &mut Vec<Violation>,
) {
    let mut refuse = |rule, tensor: &str, found: String, needed: String| {
        violations.push(Violation {
            rule,
            section: INDEX.into(),
            field: tensor.into(),
            range: 0..0,
            found,
            needed,
        });
    };
    for tensor in duplicates(index.iter().map(|(tensor, _)| tensor.as_str()).collect()) {
        refuse(Rule::SourceDuplicate, tensor, "the name twice in the index".into(), "each name once".into());
    }
    let by_name: HashMap<&str, &Listed> =
        shards.iter().map(|listed| (listed.0.name.as_str(), listed)).collect();
    for (tensor, file) in index {
        if !by_name.contains_key(file.as_str()) {
            continue; // reported where it was opened
        }
        let holder = catalogue.get(tensor.as_str()).and_then(|(number, _)| shards.get(*number));
        match holder {
            Some((shard, _)) if shard.name == *file => {}
            Some((shard, _)) => {
                refuse(
                    Rule::SourceContainer,
                    tensor,
                    format!("the tensor in {}", shard.name),
                    format!("it in {file}"),
                );
            }
            // Tensors that the model needs are reported as missing in any case.
            None if names::is_original(tensor) || names::is_hugging_face(tensor) => {}
            None => {
                refuse(Rule::SourceMissing, tensor, format!("no such tensor in {file}"), "the tensor".into())
            }
        }
    }
}

fn layout(catalogue: &Catalogue, unreadable: bool, violations: &mut Vec<Violation>) -> Option<Layout> {
    let names = || catalogue.keys().copied();
    let refuse = |rule, field: &str, found: String, needed: &str| Violation {
        rule,
        section: "*.safetensors".into(),
        field: field.into(),
        range: 0..0,
        found,
        needed: needed.into(),
    };
    let original = names().filter(|name| names::is_original(name)).min();
    let hugging_face = names().filter(|name| names::is_hugging_face(name)).min();
    match (original, hugging_face) {
        (Some(original), Some(hugging_face)) => {
            let found = format!("both {original} and {hugging_face}");
            let needed = "tensors of one layout, original or Hugging Face";
            violations.push(refuse(Rule::SourceContainer, "layout", found, needed));
            None
        }
        (Some(_), None) => Some(Layout::Original),
        (None, Some(_)) if names().any(names::is_bf16_experts) => Some(Layout::HuggingFaceBf16),
        (None, Some(_)) => Some(Layout::HuggingFace),
        (None, None) => {
            if !unreadable {
                let found = match names().min() {
                    Some(name) => format!("{} tensors such as {}", catalogue.len(), excerpt(name)),
                    None => "no tensor".into(),
                };
                let needed =
                    "the tensors of a GPT-OSS model: embedding.weight or model.embed_tokens.weight and so on";
                violations.push(refuse(Rule::SourceMissing, "embedding.weight", found, needed));
            }
            None
        }
    }
}

/// Finds each canonical tensor among the stored ones and checks dtypes and shapes.
struct Resolver<'a> {
    layout: Layout,
    dims: Dims,
    shards: &'a [Listed],
    catalogue: &'a Catalogue<'a>,
    excused: &'a HashSet<String>,
    report_missing: bool,
    used: HashSet<&'a str>,
    missing: usize,
    /// BF16 expert tensors, once each.
    bf16: Vec<Part>,
    violations: &'a mut Vec<Violation>,
}

impl<'a> Resolver<'a> {
    fn resolve(&mut self) -> HashMap<TensorId, Origin> {
        let mut tensors = HashMap::new();
        for id in self.dims.tensors() {
            if self.missing > MAX_MISSING {
                break;
            }
            if let Some(origin) = self.origin(id) {
                tensors.insert(id, origin);
            }
        }
        tensors
    }

    fn origin(&mut self, id: TensorId) -> Option<Origin> {
        let shape = id.kind.shape(&self.dims);
        if self.layout == Layout::Original {
            return Some(Origin::Parts(vec![self.part(&id.to_string(), id.kind, &shape)?]));
        }
        let names = names::hugging_face(id);
        let bf16 = names::hugging_face_bf16(id).filter(|_| self.layout == Layout::HuggingFaceBf16);
        if let Some(bf16) = bf16 {
            let packed = names.iter().find_map(|name| Some((name, *self.catalogue.get(name.as_str())?)));
            match (self.catalogue.get(bf16.as_str()), packed) {
                (Some((number, _)), Some((name, (other, stored)))) => {
                    self.used.extend(self.catalogue.get_key_value(name.as_str()).map(|(name, _)| *name));
                    let [number, other] = [*number, other].map(|number| self.file(number));
                    let mut violation = duplicate(name, (&other, stored), &number);
                    violation.found = format!("MXFP4 experts beside {bf16} in {number}");
                    self.violations.push(violation);
                }
                (None, Some(_)) => return self.parts(id, &names, &[&shape]),
                (_, None) => {}
            }
            return self.transposed(id, &bf16);
        }
        let head = self.dims.head_dim();
        let (q, kv) = (self.dims.num_heads() * head, self.dims.num_kv_heads() * head);
        match id.kind {
            TensorKind::QkvWeight => {
                let width = self.dims.embedding_dim();
                self.parts(id, &names, &[&[q, width], &[kv, width], &[kv, width]])
            }
            TensorKind::QkvBias => self.parts(id, &names, &[&[q], &[kv], &[kv]]),
            _ => self.parts(id, &names, &[&shape]),
        }
    }

    fn parts(&mut self, id: TensorId, names: &[String], shapes: &[&[u64]]) -> Option<Origin> {
        // All are looked at before the first `None` counts, so that each is reported.
        let found: Vec<_> =
            names.iter().zip(shapes).map(|(name, shape)| self.part(name, id.kind, shape)).collect();
        Some(Origin::Parts(found.into_iter().collect::<Option<_>>()?))
    }

    /// A BF16 expert tensor. Blocks and scales both lead here; it is checked once.
    fn transposed(&mut self, id: TensorId, name: &str) -> Option<Origin> {
        if id.kind.is_scales() {
            // The scales follow their blocks at once.
            return self.bf16.last().filter(|part| part.name == name).cloned().map(Origin::Transposed);
        }
        let (width, mlp) = (self.dims.embedding_dim(), self.dims.mlp_dim());
        let shape = match id.kind {
            TensorKind::Mlp1Blocks => [self.dims.num_experts(), width, 2 * mlp],
            _ => [self.dims.num_experts(), mlp, width],
        };
        let part = self.stored(name, "BF16", None, &shape)?;
        self.bf16.push(part.clone());
        Some(Origin::Transposed(part))
    }

    fn part(&mut self, name: &str, kind: TensorKind, shape: &[u64]) -> Option<Part> {
        let rows =
            matches!(kind, TensorKind::Embedding | TensorKind::Unembedding).then(|| self.dims.vocabulary());
        self.stored(name, kind.dtype().name(), rows, shape)
    }

    /// The stored tensor of this name, where dtype and shape are right. With `rows` it may have more rows than these.
    fn stored(&mut self, name: &str, dtype: &str, rows: Option<u64>, shape: &[u64]) -> Option<Part> {
        let Some((&name, &(number, stored))) = self.catalogue.get_key_value(name) else {
            self.report_missing(name, dtype, shape);
            return None;
        };
        self.used.insert(name);
        let file = self.file(number);
        let mut sound = true;
        let mut refuse = |rule, found: String, needed: String| {
            sound = false;
            let range = stored.range.clone();
            self.violations.push(Violation {
                rule,
                section: file.clone(),
                field: name.into(),
                range,
                found,
                needed,
            });
        };
        let found = stored.dtype.to_string();
        if found != dtype {
            let fp8 = if found.starts_with("F8_") { " (FP8)" } else { "" };
            refuse(Rule::SourceDtype, format!("{found}{fp8}"), dtype.into());
        }
        match (rows, stored.shape.as_slice()) {
            (Some(rows), [found, rest @ ..]) if Some(rest) == shape.get(1..) => {
                if *found < rows {
                    let needed = format!("at least {rows} rows, one for each token");
                    refuse(Rule::SourceRows, format!("{found} rows"), needed);
                }
            }
            (None, found) if found == shape => {}
            (rows, found) => {
                let more = if rows.is_some() { " or more rows" } else { "" };
                refuse(Rule::SourceShape, format!("{found:?}"), format!("{shape:?}{more}"));
            }
        }
        let (shape, range) = (stored.shape.clone(), stored.range.clone());
        sound.then(|| Part { name: name.into(), shape, range, shard: number })
    }

    fn report_missing(&mut self, name: &str, dtype: &str, shape: &[u64]) {
        if !self.report_missing || self.excused.contains(name) {
            // Still counted: what else is missing is bounded by nothing but the config.
            self.missing += usize::from(!self.excused.contains(name));
            return;
        }
        self.missing += 1;
        let (found, needed) = if self.missing > MAX_MISSING {
            ("more missing tensors, not listed".into(), "all of them; check num_hidden_layers".into())
        } else {
            ("no such tensor".into(), format!("{dtype} {shape:?}"))
        };
        let section = match self.shards {
            [(shard, _)] => shard.name.clone(),
            shards => format!("{} shards", shards.len()),
        };
        let violation =
            Violation { rule: Rule::SourceMissing, section, field: name.into(), range: 0..0, found, needed };
        self.violations.push(violation);
    }

    fn file(&self, number: usize) -> String {
        self.shards.get(number).map(|(shard, _)| shard.name.clone()).unwrap_or_default()
    }

    fn refuse_bf16(&mut self, quantize: bool) {
        if let (false, [first, others @ ..]) = (quantize, self.bf16.as_slice()) {
            let more = if others.is_empty() {
                String::new()
            } else {
                format!(" and {} more such tensors", others.len())
            };
            let violation = Violation {
                rule: Rule::SourceExpertsBf16,
                section: self.file(first.shard),
                field: first.name.clone(),
                range: first.range.clone(),
                found: format!("BF16 {:?}{more}", first.shape),
                needed: "MXFP4 blocks and scales".into(),
            };
            self.violations.push(violation);
        }
    }

    /// Tensors that the model does not have. Whole blocks of them mean that the config is another model's.
    fn note_unused(&mut self, notes: &mut Vec<String>) {
        let mut unused: Vec<&str> =
            self.catalogue.keys().copied().filter(|name| !self.used.contains(name)).collect();
        unused.sort_unstable();
        let beyond = unused.iter().filter_map(|name| Some((names::block_of(name)?, *name)));
        let last = beyond.filter(|(block, _)| u64::from(*block) >= self.dims.num_blocks()).max();
        if let Some((_, name)) = last {
            self.violations.push(Violation {
                rule: Rule::SourceConfig,
                section: config::FILE.into(),
                field: "num_hidden_layers".into(),
                range: 0..0,
                found: format!("{}, beside the tensor {name}", self.dims.num_blocks()),
                needed: "as many layers as there are tensors of".into(),
            });
        }
        note_some(notes, "tensors that the model does not have, ignored", &unused);
    }
}
