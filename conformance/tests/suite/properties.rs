//! Properties of any model, however odd its sizes.

use std::io::Cursor;
use std::path::Path;

use binrw::BinRead;
use conformance::synthetic::Synthetic;
use formats::canonical::Source;
use formats::compare;
use formats::model_bin::header::ModelHeader;
use formats::model_bin::layout::File;
use formats::model_bin::section::SectionMap;
use formats::model_bin::write::write_to;
use formats::model_bin::{Depth, Verified};
use proptest::prelude::*;

prop_compose! {
    /// Models of up to a megabyte.
    fn model()(
        num_blocks in 0u32..3,
        num_experts in 4u32..7,
        embedding_dim in (1u32..4).prop_map(|n| n * 32),
        mlp_dim in (1u32..4).prop_map(|n| n * 32),
        num_kv_heads in 1u32..3,
        group in 1u32..4,
        context_length in 1u32..,
        attention_window in 1u32..,
        seed in any::<u64>(),
    ) -> Synthetic {
        let header = ModelHeader {
            num_blocks,
            num_experts,
            embedding_dim,
            mlp_dim,
            num_kv_heads,
            num_heads: num_kv_heads * group,
            context_length,
            attention_window,
            ..ModelHeader::GPT_OSS_20B
        };
        Synthetic::new(header, fixtures::vocabulary::small(), seed).unwrap()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_is_valid_and_reads_as_planned(model in model()) {
        let mut bytes = Cursor::new(Vec::new());
        let planned = write_to(&model, &mut bytes, &()).unwrap();
        let bytes = bytes.into_inner();
        let read = File::read_args(&mut Cursor::new(&bytes), binrw::args! { len: bytes.len() as u64 }).unwrap();
        prop_assert_eq!(&read, &planned);
        let verified = Verified::from_bytes(Path::new("property"), bytes, Depth::Full).unwrap();
        prop_assert_eq!(compare::against(&verified, &model, &()).unwrap(), []);
        prop_assert_eq!(compare::models(&verified, &model, &()).unwrap(), []);
    }

    #[test]
    fn every_byte_has_one_owner(model in model(), cut in any::<prop::sample::Index>()) {
        let mut bytes = Cursor::new(Vec::new());
        write_to(&model, &mut bytes, &()).unwrap();
        let bytes = bytes.into_inner();
        for bytes in [&bytes[..], &bytes[..cut.index(bytes.len())]] {
            let mut end = 0;
            for span in SectionMap::read(bytes).spans {
                prop_assert_eq!(span.range.start, end);
                end = span.range.end;
            }
            prop_assert_eq!(end, bytes.len() as u64);
            let mut dump = Vec::new();
            formats::model_bin::dump::dump(bytes, &mut dump, Default::default()).unwrap();
        }
    }

    #[test]
    fn a_changed_weight_is_found_at_its_element(model in model(), position in any::<prop::sample::Index>()) {
        let mut bytes = Cursor::new(Vec::new());
        let file = write_to(&model, &mut bytes, &()).unwrap();
        let mut bytes = bytes.into_inner();
        let start = file.weights.embedding.range.start;
        let position = start + position.index((bytes.len() as u64 - start) as usize) as u64;
        let map = SectionMap::of(&file, bytes.len() as u64);
        let owner = map.owner(position).unwrap().clone();
        // The lowest bit of a byte of a BF16 leaves it finite, of a scale at most 241 + 14 in range or not.
        bytes[position as usize] ^= 1;
        match Verified::from_bytes(Path::new("property"), bytes, Depth::Full) {
            Ok(verified) => {
                let found = compare::against(&verified, &model, &()).unwrap();
                prop_assert_eq!(found.len(), 1);
                prop_assert_eq!(&found[0].range, &(position..position + 1));
                prop_assert_eq!(&found[0].field, &owner.name);
            }
            Err(error) => {
                let named = error.violations().iter().filter(|violation| violation.is_error());
                prop_assert!(named.clone().count() == 1);
                for violation in named {
                    prop_assert!(violation.range.contains(&position), "{} for byte {}", violation, position);
                }
            }
        }
    }

    #[test]
    fn rows_read_alone_equal_rows_read_together(model in model(), pick in any::<prop::sample::Index>()) {
        let mut bytes = Cursor::new(Vec::new());
        write_to(&model, &mut bytes, &()).unwrap();
        let verified = Verified::from_bytes(Path::new("property"), bytes.into_inner(), Depth::Structure).unwrap();
        let ids: Vec<_> = model.dims().tensors().collect();
        let id = ids[pick.index(ids.len())];
        let (rows, row_bytes) = (id.kind.rows(model.dims()), id.kind.row_bytes(model.dims()) as usize);
        let mut together = vec![0; rows as usize * row_bytes];
        verified.read_rows(id, 0..rows, &mut together).unwrap();
        for (row, wanted) in (0..rows).zip(together.chunks(row_bytes)) {
            let mut alone = vec![0; row_bytes];
            verified.read_rows(id, row..row + 1, &mut alone).unwrap();
            prop_assert_eq!(&alone, wanted);
        }
    }
}
