//! What holds for every model that a reader accepted.

use formats::Rule;
use formats::canonical::{Source, for_each_run};
use formats::model_bin::Depth;
use formats::model_bin::verify::{check_model_header, verify};
use formats::violation::Error;

use crate::tiny::model_bin;

/// The header breaks no rule, each row can be read, and the `model.bin` of the model is valid. The writer may refuse
/// it before that, but only because of its vocabulary or a NaN.
pub(crate) fn check(source: &dyn Source) {
    assert_eq!(check_model_header(source.header()), []);
    if let Err(error) = source.check_values(&()) {
        assert!(!error.violations().is_empty(), "{error}");
        return;
    }
    for id in source.dims().tensors() {
        let mut next = 0;
        let rows = for_each_run(source, id, 3, 1000, |run, rows| {
            assert_eq!(run.start, next);
            next = run.end;
            // A byte that is not filled in stays as it was.
            let mut again: Vec<u8> = rows.iter().map(|byte| !byte).collect();
            source.read_rows(id, run, &mut again)?;
            assert!(again == rows, "{id} is not read whole, or otherwise when read again");
            Ok(())
        });
        rows.unwrap_or_else(|error| panic!("{id} cannot be read: {error}"));
        assert_eq!(next, id.kind.rows(source.dims()));
    }
    match model_bin(source) {
        Ok(bytes) => {
            let report = verify(&bytes, Depth::Full, &());
            assert!(report.is_valid(), "an export breaks {:?}", report.violations);
        }
        Err(Error::Invalid { violations, .. }) => {
            assert!(violations.iter().any(|violation| violation.is_error()));
            let known = |rule: Rule| rule == Rule::SourceNan || rule.id().starts_with("TOK-");
            let unknown = violations.iter().find(|violation| violation.is_error() && !known(violation.rule));
            assert!(unknown.is_none(), "accepted, and then refused for {unknown:?}");
        }
        Err(error) => panic!("an export fails with {error}"),
    }
}
