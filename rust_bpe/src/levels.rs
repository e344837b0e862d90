//! Amplitudes as levels: relative to the minimum and the maximum of a recording, cut into so many equal bins.

/// Why a recording has no levels.
#[derive(Debug, PartialEq)]
pub enum Unusable {
    Empty,
    /// So many samples are NaN or infinite.
    NotFinite(usize),
    /// The maximum minus the minimum is more than a float64 holds.
    TooWide,
}

/// Samples are handled in blocks of this length, whose loops the compiler turns into vector instructions.
const LANES: usize = 16;

/// A float that widens to a float64 without loss.
pub trait Sample: Copy + PartialOrd + Into<f64> + std::ops::Mul<Output = Self> + std::ops::AddAssign {
    const ZERO: Self;
}

impl Sample for f32 {
    const ZERO: Self = 0.0;
}

impl Sample for f64 {
    const ZERO: Self = 0.0;
}

/// The bin of each sample, 0..bins: floor(bins * (x - min) / (max - min + eps)), the last where that is `bins`; in
/// float64, in just these steps. A constant recording is all 0. Panics for a negative `eps` and for bins beyond 1..=256.
pub fn levels<S: Sample>(samples: &[S], eps: f64, bins: usize) -> Result<Vec<u8>, Unusable> {
    assert!(eps >= 0.0 && (1..=256).contains(&bins));
    let (low, high) = range(samples)?;
    let mut out = vec![0; samples.len()];
    if low == high {
        return Ok(out);
    }
    let width = high - low + eps;
    if !width.is_finite() {
        return Err(Unusable::TooWide);
    }
    let (bins, last) = (bins as f64, (bins - 1) as f64);
    for (out, &x) in out.iter_mut().zip(samples) {
        let scaled = (x.into() - low) / width * bins;
        let bin = if scaled > 0.0 { scaled } else { 0.0 };
        let bin = if bin < last { bin } else { last };
        // SAFETY: `bin` lies in [0, 255], whatever `x` is. (A cast that saturates takes half as long again.)
        *out = unsafe { bin.to_int_unchecked::<i32>() } as u8;
    }
    Ok(out)
}

/// The least and the greatest sample.
fn range<S: Sample>(samples: &[S]) -> Result<(f64, f64), Unusable> {
    let &first = samples.first().ok_or(Unusable::Empty)?;
    let (mut low, mut high, mut zero) = ([first; LANES], [first; LANES], [S::ZERO; LANES]);
    let whole = samples.chunks_exact(LANES);
    let rest = whole.remainder();
    let last: [S; LANES] = std::array::from_fn(|i| *rest.get(i).unwrap_or(&first));
    for block in whole.chain(std::iter::once(&last[..])) {
        let block: &[S; LANES] = block.try_into().expect("a whole block");
        for i in 0..LANES {
            low[i] = if block[i] < low[i] { block[i] } else { low[i] };
            high[i] = if block[i] > high[i] { block[i] } else { high[i] };
            zero[i] += block[i] * S::ZERO; // from here on NaN, if the sample is not finite
        }
    }
    if zero.iter().any(|&zero| zero != S::ZERO) {
        return Err(Unusable::NotFinite(samples.iter().filter(|&&x| !x.into().is_finite()).count()));
    }
    let low = low.map(Into::into).into_iter().fold(first.into(), f64::min);
    Ok((low, high.map(Into::into).into_iter().fold(first.into(), f64::max)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn levels_are_those_of_the_formula(samples in prop::collection::vec(-1e6f64..1e6, 1..200), bins in 2usize..=256) {
            let low = samples.iter().copied().fold(f64::INFINITY, f64::min);
            let high = samples.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let level = |x: &f64| ((x - low) / (high - low + 1e-6) * bins as f64).floor().clamp(0.0, bins as f64 - 1.0) as u8;
            prop_assert_eq!(levels(&samples, 1e-6, bins).unwrap(), samples.iter().map(level).collect::<Vec<_>>());
        }

        #[test]
        fn a_float32_has_the_level_of_the_float64_that_it_is(samples in prop::collection::vec(-1e3f32..1e3, 1..200)) {
            let wide: Vec<f64> = samples.iter().map(|&x| f64::from(x)).collect();
            prop_assert_eq!(levels(&samples, 1e-6, 26).unwrap(), levels(&wide, 1e-6, 26).unwrap());
        }

        #[test]
        fn any_samples_have_levels_or_a_reason(samples in prop::collection::vec(any::<f64>(), 0..50), bins in 2usize..=256) {
            match levels(&samples, 0.0, bins) {
                Ok(levels) => prop_assert!(levels.len() == samples.len() && levels.iter().all(|&l| usize::from(l) < bins)),
                Err(Unusable::Empty) => prop_assert!(samples.is_empty()),
                Err(Unusable::NotFinite(n)) => prop_assert_eq!(n, samples.iter().filter(|x| !x.is_finite()).count()),
                Err(Unusable::TooWide) => prop_assert!(samples.iter().any(|x| x.abs() > 1e307)),
            }
        }
    }

    #[test]
    fn extremes_are_the_first_and_the_last_level_and_a_constant_is_the_first() {
        assert_eq!(levels(&[-1.0f32, 0.0, 1.0], 1e-6, 26).unwrap(), [0, 12, 25]);
        assert_eq!(levels(&[-1.0f64, 1.0], 0.0, 2).unwrap(), [0, 1]);
        assert_eq!(levels(&[7.0f64; 40], 0.0, 26).unwrap(), [0; 40]);
    }

    #[test]
    fn one_bad_sample_is_found_wherever_it_is() {
        for place in 0..40 {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut samples = [0.5f32; 40];
                samples[place] = bad;
                assert_eq!(levels(&samples, 1e-6, 26), Err(Unusable::NotFinite(1)));
            }
        }
    }
}
