//! A pickle interpreter that executes nothing: it knows the few constructions of which a saved state
//! dictionary is made, and refuses everything else.

use std::{collections::HashMap, fmt::Display};

use transnormer::{
    dtype::DType,
    error::{Error, ErrorKind, Result},
};

/// Limit on the values of one pickle, on its stack, in its memo and in its tables; a 7B shard has a
/// thousand or two.
const MAX_VALUES: usize = 1 << 20;

/// A tensor as a pickle describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PickledTensor {
    /// Name of the storage entry, unique in the file.
    pub storage_key: String,
    /// Element type of the storage.
    pub dtype: DType,
    /// Elements in the storage.
    pub storage_len: u64,
    /// First element of the tensor in the storage.
    pub offset: u64,
    /// Dimensions, slowest first.
    pub shape: Vec<u64>,
    /// Distance in elements between neighbours along each dimension.
    pub strides: Vec<u64>,
}

/// Interprets the pickle of a state dictionary: its tensors by name, in the order of the file.
///
/// # Errors
/// [`ErrorKind::Format`] on anything that is not a dictionary of tensors, [`ErrorKind::Unsupported`] on
/// a call outside the allow-list; the line names the call.
pub fn state_dict(bytes: &[u8]) -> Result<Vec<(String, PickledTensor)>> {
    let mut machine = Machine { input: bytes, ..Machine::default() };
    let root = machine.run()?;
    let Value::Dict(dict) = root else { return Err(invalid("the top level is not a dictionary of tensors")) };
    machine.dicts[dict]
        .iter()
        .map(|&(key, value)| match (key, value) {
            (Value::Text(name), Value::Tensor(tensor)) => {
                Ok((name.to_owned(), machine.tensors[tensor].clone()))
            }
            (Value::Text(name), _) => Err(invalid(format_args!(
                "{name:?} is not a tensor: a training checkpoint? save model.state_dict() alone"
            ))),
            _ => Err(invalid("a key of the dictionary is not text")),
        })
        .collect()
}

/// What a pickle may name. Nothing here runs code: calls are recognised and answered by this module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(DType),
}

/// A pickled value. Composite ones are indices into the machine's tables, so values are small, and a
/// hostile nesting depth costs no recursion.
#[derive(Debug, Clone, Copy)]
enum Value<'a> {
    Mark,
    None,
    Bool,
    Int(i64),
    Text(&'a str),
    Tuple(usize),
    List,
    Dict(usize),
    Global(Global),
    Storage(usize),
    Tensor(usize),
}

#[derive(Default)]
struct Machine<'a> {
    input: &'a [u8],
    stack: Vec<Value<'a>>,
    memo: HashMap<u32, Value<'a>>,
    tuples: Vec<Vec<Value<'a>>>,
    dicts: Vec<Vec<(Value<'a>, Value<'a>)>>,
    storages: Vec<(DType, &'a str, u64)>,
    tensors: Vec<PickledTensor>,
}

impl<'a> Machine<'a> {
    fn run(&mut self) -> Result<Value<'a>> {
        loop {
            let opcode = self.byte()?;
            if opcode == b'.' {
                return self.pop();
            }
            self.step(opcode)?;
            let tables = self.tuples.len() + self.dicts.len() + self.storages.len();
            if self.stack.len().max(self.memo.len()).max(tables) > MAX_VALUES {
                return Err(invalid("more values than a state dictionary can have"));
            }
        }
    }

    /// Executes one opcode. Their letters are those of Python's `pickletools`.
    fn step(&mut self, opcode: u8) -> Result<()> {
        match opcode {
            0x80 => return self.protocol(),
            0x95 => return self.take(8).map(drop),
            b'(' => self.stack.push(Value::Mark),
            b'N' => self.stack.push(Value::None),
            0x88 | 0x89 => self.stack.push(Value::Bool),
            b'K' | b'M' | b'J' | 0x8a => return self.integer(opcode),
            b'X' | 0x8c | 0x8d => return self.text(opcode),
            b')' => self.push_tuple(Vec::new()),
            b't' => {
                let items = self.pop_to_mark()?;
                self.push_tuple(items);
            }
            0x85..=0x87 => {
                let items = self.pop_many(usize::from(opcode - 0x84))?;
                self.push_tuple(items);
            }
            b']' => self.stack.push(Value::List),
            b'a' => return self.append(1),
            b'e' => {
                self.pop_to_mark()?;
                return self.append(0);
            }
            b'}' => self.push_dict(),
            b's' => {
                let items = self.pop_many(2)?;
                return self.set_items(&items);
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                return self.set_items(&items);
            }
            b'q' | b'r' | 0x94 => return self.memoize(opcode),
            b'h' | b'j' => return self.recall(opcode),
            b'c' | 0x93 => return self.global(opcode),
            b'R' => return self.call(),
            b'b' => return self.set_state(),
            b'Q' => return self.persistent_id(),
            other => {
                return Err(unsupported(format_args!(
                    "pickle instruction 0x{other:02x}, which a state dictionary does not need"
                )));
            }
        }
        Ok(())
    }

    fn protocol(&mut self) -> Result<()> {
        match self.byte()? {
            2..=5 => Ok(()),
            other => Err(unsupported(format_args!("pickle protocol {other}"))),
        }
    }

    fn integer(&mut self, opcode: u8) -> Result<()> {
        let value = match opcode {
            b'K' => self.byte()?.into(),
            b'M' => u16::from_le_bytes(self.array()?).into(),
            b'J' => i32::from_le_bytes(self.array()?).into(),
            _ => {
                let len = usize::from(self.byte()?);
                let bytes = self.take(len)?;
                if len > 8 {
                    return Err(invalid("a number of more than 64 bits"));
                }
                // Little-endian two's complement of any length: extend the sign of the last byte.
                let fill = if bytes.last().is_some_and(|last| last & 0x80 != 0) { 0xff } else { 0 };
                let mut wide = [fill; 8];
                wide[..len].copy_from_slice(bytes);
                i64::from_le_bytes(wide)
            }
        };
        self.stack.push(Value::Int(value));
        Ok(())
    }

    fn text(&mut self, opcode: u8) -> Result<()> {
        let len = match opcode {
            0x8c => self.byte()?.into(),
            b'X' => u32::from_le_bytes(self.array()?).into(),
            _ => u64::from_le_bytes(self.array()?),
        };
        let bytes = self.take(usize::try_from(len).unwrap_or(usize::MAX))?;
        let text = std::str::from_utf8(bytes).map_err(|_| invalid("text that is not UTF-8"))?;
        self.stack.push(Value::Text(text));
        Ok(())
    }

    fn append(&mut self, items: usize) -> Result<()> {
        self.pop_many(items)?;
        // Lists occur only in attributes that are dropped, so their items are not kept.
        match self.stack.last() {
            Some(Value::List) => Ok(()),
            _ => Err(invalid("append to something that is not a list")),
        }
    }

    fn set_items(&mut self, items: &[Value<'a>]) -> Result<()> {
        let Some(Value::Dict(dict)) = self.stack.last() else {
            return Err(invalid("an item set in something that is not a dictionary"));
        };
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(invalid("a dictionary key without a value"));
        }
        self.dicts[*dict].extend(pairs.iter().map(|&[key, value]| (key, value)));
        Ok(())
    }

    fn memoize(&mut self, opcode: u8) -> Result<()> {
        let slot = match opcode {
            b'q' => self.byte()?.into(),
            b'r' => u32::from_le_bytes(self.array()?),
            _ => self.memo.len() as u32,
        };
        let value = *self.stack.last().ok_or_else(|| invalid("the stack is empty"))?;
        self.memo.insert(slot, value);
        Ok(())
    }

    fn recall(&mut self, opcode: u8) -> Result<()> {
        let slot = match opcode {
            b'h' => self.byte()?.into(),
            _ => u32::from_le_bytes(self.array()?),
        };
        let value = self.memo.get(&slot).ok_or_else(|| invalid("a reference to a value never stored"))?;
        self.stack.push(*value);
        Ok(())
    }

    fn global(&mut self, opcode: u8) -> Result<()> {
        let (module, name) = if opcode == b'c' {
            (self.line()?, self.line()?)
        } else {
            match self.pop_many(2)?[..] {
                [Value::Text(module), Value::Text(name)] => (module, name),
                _ => return Err(invalid("a global whose name is not text")),
            }
        };
        self.stack.push(Value::Global(allowed_global(module, name)?));
        Ok(())
    }

    fn call(&mut self) -> Result<()> {
        let [function, arguments] = self.pop_many(2)?[..] else {
            return Err(invalid("a call without function"));
        };
        let Value::Tuple(arguments) = arguments else { return Err(invalid("a call without arguments")) };
        // Taken, not copied: a hostile pickle could call a million times with the same million arguments.
        let arguments = std::mem::take(&mut self.tuples[arguments]);
        match (function, &arguments[..]) {
            (Value::Global(Global::OrderedDict), []) => self.push_dict(),
            (Value::Global(Global::RebuildTensor), _) => return self.rebuild_tensor(&arguments),
            (Value::Global(Global::RebuildParameter), &[tensor @ Value::Tensor(_), ..]) => {
                self.stack.push(tensor);
            }
            _ => return Err(invalid("a call with arguments that torch.save does not write")),
        }
        Ok(())
    }

    /// `(storage, offset, shape, strides, …)`; what follows are gradient flags and hooks, without meaning here.
    fn rebuild_tensor(&mut self, arguments: &[Value<'a>]) -> Result<()> {
        let &[Value::Storage(storage), Value::Int(offset), Value::Tuple(shape), Value::Tuple(strides), ..] =
            arguments
        else {
            return Err(invalid("a tensor with arguments that torch.save does not write"));
        };
        let (dtype, key, storage_len) = self.storages[storage];
        let offset = u64::try_from(offset).map_err(|_| invalid("a tensor with a negative offset"))?;
        let (shape, strides) = (self.dimensions(shape)?, self.dimensions(strides)?);
        if shape.len() != strides.len() {
            return Err(invalid("a tensor whose shape and strides differ in length"));
        }
        self.stack.push(Value::Tensor(self.tensors.len()));
        self.tensors.push(PickledTensor {
            storage_key: key.to_owned(),
            dtype,
            storage_len,
            offset,
            shape,
            strides,
        });
        Ok(())
    }

    fn dimensions(&self, tuple: usize) -> Result<Vec<u64>> {
        let items = &self.tuples[tuple];
        if items.len() > 8 {
            return Err(invalid("a tensor of more than 8 dimensions"));
        }
        let dimension = |item: &Value<'_>| match item {
            Value::Int(number) => u64::try_from(*number).ok(),
            _ => None,
        };
        let dimensions: Option<Vec<u64>> = items.iter().map(dimension).collect();
        dimensions.ok_or_else(|| invalid("a tensor dimension that is not a whole number"))
    }

    /// `BUILD` sets attributes, on a state dictionary its `_metadata`. They are dropped.
    fn set_state(&mut self) -> Result<()> {
        self.pop()?;
        match self.stack.last() {
            Some(Value::Dict(_)) => Ok(()),
            _ => Err(unsupported("attributes set on something that is not a dictionary")),
        }
    }

    /// `('storage', type, key, device, elements)`.
    fn persistent_id(&mut self) -> Result<()> {
        let Value::Tuple(id) = self.pop()? else {
            return Err(invalid("a persistent id that is not a tuple"));
        };
        let &[
            Value::Text("storage"),
            Value::Global(Global::Storage(dtype)),
            Value::Text(key),
            _,
            Value::Int(len),
        ] = &self.tuples[id][..]
        else {
            return Err(invalid("a persistent id that is not a tensor storage"));
        };
        let len = u64::try_from(len).map_err(|_| invalid("a storage of negative length"))?;
        self.stack.push(Value::Storage(self.storages.len()));
        self.storages.push((dtype, key, len));
        Ok(())
    }

    fn push_tuple(&mut self, items: Vec<Value<'a>>) {
        self.stack.push(Value::Tuple(self.tuples.len()));
        self.tuples.push(items);
    }

    fn push_dict(&mut self) {
        self.stack.push(Value::Dict(self.dicts.len()));
        self.dicts.push(Vec::new());
    }

    fn pop(&mut self) -> Result<Value<'a>> {
        match self.stack.pop() {
            None | Some(Value::Mark) => Err(invalid("the stack is empty")),
            Some(value) => Ok(value),
        }
    }

    fn pop_many(&mut self, count: usize) -> Result<Vec<Value<'a>>> {
        let start = self.stack.len().checked_sub(count).ok_or_else(|| invalid("the stack is empty"))?;
        let items = self.stack.split_off(start);
        match items.iter().any(|item| matches!(item, Value::Mark)) {
            true => Err(invalid("the stack is empty")),
            false => Ok(items),
        }
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Value<'a>>> {
        let mark = self.stack.iter().rposition(|item| matches!(item, Value::Mark));
        let mark = mark.ok_or_else(|| invalid("no mark on the stack"))?;
        let items = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(items)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let (head, tail) = self.input.split_at_checked(len).ok_or_else(ends_early)?;
        self.input = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (head, tail) = self.input.split_first_chunk().ok_or_else(ends_early)?;
        self.input = tail;
        Ok(*head)
    }

    fn byte(&mut self) -> Result<u8> {
        self.array().map(u8::from_le_bytes)
    }

    fn line(&mut self) -> Result<&'a str> {
        let len = self.input.iter().position(|byte| *byte == b'\n').ok_or_else(ends_early)?;
        let line = self.take(len)?;
        self.take(1)?;
        std::str::from_utf8(line).map_err(|_| invalid("text that is not UTF-8"))
    }
}

fn allowed_global(module: &str, name: &str) -> Result<Global> {
    match (module, name) {
        ("collections", "OrderedDict") => Ok(Global::OrderedDict),
        ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Ok(Global::RebuildTensor),
        ("torch._utils", "_rebuild_parameter") => Ok(Global::RebuildParameter),
        ("torch", "FloatStorage") => Ok(Global::Storage(DType::F32)),
        ("torch", "HalfStorage") => Ok(Global::Storage(DType::F16)),
        ("torch", "BFloat16Storage") => Ok(Global::Storage(DType::BF16)),
        ("torch", other) if other.ends_with("Storage") => {
            Err(unsupported(format_args!("tensors in torch.{other}, not float32, float16 or bfloat16")))
        }
        _ => {
            let call = format!("{module}.{name}");
            Err(unsupported(format_args!(
                "the pickle calls {call:?}, which no checkpoint of weights needs; nothing was run"
            )))
        }
    }
}

fn ends_early() -> Error {
    invalid("the pickle ends early")
}

fn invalid(message: impl Display) -> Error {
    Error::new(ErrorKind::Format, format_args!("not a state dictionary: {message}"))
}

fn unsupported(message: impl Display) -> Error {
    Error::new(ErrorKind::Unsupported, format_args!("refused: {message}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Opcodes of one tensor entry: name, storage type, shape and strides of two dimensions.
    fn tensor(name: &str, storage: &str, [rows, cols]: [u8; 2], strides: [u8; 2]) -> Vec<u8> {
        let mut code = text(name);
        code.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        code.extend(text("storage"));
        code.extend(format!("ctorch\n{storage}\n").bytes());
        code.extend(text("0"));
        code.extend(text("cpu"));
        code.extend([b'K', rows * cols, b't', b'Q', b'K', 0, b'K', rows, b'K', cols, 0x86]);
        code.extend([b'K', strides[0], b'K', strides[1], 0x86, 0x89]);
        code.extend(b"ccollections\nOrderedDict\n)RtR");
        code
    }

    fn text(text: &str) -> Vec<u8> {
        [&[b'X'][..], &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()
    }

    fn dict(items: &[u8]) -> Vec<u8> {
        [&b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01("[..], items, b"u."].concat()
    }

    #[test]
    fn reads_a_state_dictionary() {
        let items =
            [tensor("a", "FloatStorage", [2, 3], [3, 1]), tensor("b", "BFloat16Storage", [3, 2], [1, 3])];
        let tensors = state_dict(&dict(&items.concat())).unwrap();
        assert_eq!(tensors.len(), 2);
        let (name, a) = &tensors[0];
        assert_eq!((name.as_str(), a.dtype, a.storage_len, a.offset), ("a", DType::F32, 6, 0));
        assert_eq!((&a.shape[..], &a.strides[..]), (&[2, 3][..], &[3, 1][..]));
        assert_eq!((tensors[1].1.dtype, &tensors[1].1.strides[..]), (DType::BF16, &[1, 3][..]));
    }

    #[test]
    fn code_is_refused_by_name() {
        for (module, name) in
            [("os", "system"), ("builtins", "eval"), ("torch", "load"), ("torch._utils", "x")]
        {
            let call = format!("c{module}\n{name}\n(");
            let code = [&b"\x80\x02"[..], call.as_bytes(), &text("true"), b"tR."].concat();
            let error = state_dict(&code).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains(&format!("\"{module}.{name}\"")), "{error}");
        }
        let by_stack = [&b"\x80\x04"[..], &text("posix"), &text("system"), b"\x93)R."].concat();
        assert!(state_dict(&by_stack).unwrap_err().to_string().contains("posix.system"));
    }

    #[test]
    fn refuses_what_is_not_a_state_dictionary() {
        let double = dict(&tensor("a", "DoubleStorage", [1, 1], [1, 1]));
        let wide = [&b"\x80\x02\x8a\x09"[..], &[1; 9], b"."].concat();
        for (code, expected) in [
            (&b""[..], "ends early"),
            (b"\x80\x02", "ends early"),
            (b"\x80\x00.", "pickle protocol 0"),
            (b"\x80\x02K\x01.", "not a dictionary"),
            (b"\x80\x02}(K\x01K\x02u.", "key of the dictionary is not text"),
            (b"\x80\x02}(K\x01u.", "key without a value"),
            (b"\x80\x02}u.", "no mark"),
            (b"\x80\x02t.", "no mark"),
            (b"\x80\x02\x85.", "stack is empty"),
            (b"\x80\x02(\x85.", "stack is empty"),
            (b"\x80\x02h\x05.", "never stored"),
            (b"\x80\x02I1\n.", "instruction 0x49"),
            (b"\x80\x02X\xff\xff\xff\xff.", "ends early"),
            (b"\x80\x02X\x01\x00\x00\x00\xff.", "not UTF-8"),
            (b"\x80\x02cos\n", "ends early"),
            (b"\x80\x02K\x01K\x02b.", "not a dictionary"),
            (b"\x80\x02)Q.", "not a tensor storage"),
            (&double, "torch.DoubleStorage"),
            (&wide, "more than 64 bits"),
            (&dict(&[text("step"), vec![b'K', 3]].concat()), "\"step\" is not a tensor"),
        ] {
            let error = state_dict(code).unwrap_err().to_string();
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }

    #[test]
    fn hostile_size_and_depth_are_bounded() {
        let flood = [&b"\x80\x02"[..], &vec![b'N'; MAX_VALUES + 2], b"."].concat();
        assert!(state_dict(&flood).unwrap_err().to_string().contains("more values"));
        for (depth, expected) in [(500_000, "not a dictionary"), (2_000_000, "more values")] {
            let deep = [&b"\x80\x02)"[..], &vec![0x85; depth], b"."].concat();
            assert!(state_dict(&deep).unwrap_err().to_string().contains(expected));
        }
    }

    #[test]
    fn signed_numbers_of_any_length() {
        for (code, expected) in [
            (&b"\x8a\x00"[..], 0),
            (b"\x8a\x01\xff", -1),
            (b"\x8a\x02\xff\x00", 255),
            (b"\x8a\x05\x00\x00\x00\x00\x01", 1 << 32),
            (b"J\xfe\xff\xff\xff", -2),
        ] {
            let mut machine = Machine { input: &code[1..], ..Machine::default() };
            machine.integer(code[0]).unwrap();
            assert!(matches!(machine.stack[..], [Value::Int(number)] if number == expected), "{code:?}");
        }
    }
}
