//! Our exports of full-vocabulary models against digests of files that the genuine exporter wrote.
