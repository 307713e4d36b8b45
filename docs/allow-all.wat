;; A policy without the SDK: everybody reaches everybody, and a pod's tenant is its namespace. See interface.md.
;;
;; What makes it short: in the canonical ABI zeros mean just what this policy wants to say. A class of zeros is "ok, no
;; tenant, no labels", a decision of zeros is "no rules, otherwise allow, no reason", and every cell of zeros is decision
;; 0. So it answers with fresh memory, which is zero.
(module
  (memory (export "memory") 1)
  ;; Memory is given out from here on and never given back: hostd bounds it.
  (global $free (mut i32) (i32.const 1024))

  ;; Canonical ABI: (old pointer, old size, alignment, new size) -> pointer.
  (func $realloc (export "cabi_realloc") (param $old i32) (param $old-size i32) (param $align i32) (param $size i32)
    (result i32)
    (local $start i32) (local $end i32) (local $have i32)
    (local.set $start (i32.and (i32.add (global.get $free) (i32.const 7)) (i32.const -8)))
    (local.set $end (i32.add (local.get $start) (local.get $size)))
    (local.set $have (i32.shl (memory.size) (i32.const 16)))
    (if (i32.gt_u (local.get $end) (local.get $have))
      (then
        (if (i32.eq
              (memory.grow
                (i32.add (i32.shr_u (i32.sub (local.get $end) (local.get $have)) (i32.const 16)) (i32.const 1)))
              (i32.const -1))
          (then unreachable))))
    (global.set $free (local.get $end))
    (memory.copy (local.get $start) (local.get $old) (local.get $old-size))
    (local.get $start))

  (func $new (param $size i32) (result i32)
    (call $realloc (i32.const 0) (i32.const 0) (i32.const 8) (local.get $size)))

  ;; (config: string, placement: record of name, tier and option<tenant>) -> result<_, string>, at a pointer.
  (func (export "wasmgate:policy/policy@0.2.0#configure") (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)
    (call $new (i32.const 12)))

  ;; () -> list<network>, at a pointer.
  (func (export "wasmgate:policy/policy@0.2.0#networks") (result i32)
    (call $new (i32.const 8)))

  ;; (list<pod>) -> list<result<class, string>>, of 24 bytes each.
  (func (export "wasmgate:policy/policy@0.2.0#identify") (param $pods i32) (param $count i32) (result i32)
    (local $answer i32)
    (local.set $answer (call $new (i32.const 8)))
    (i32.store (local.get $answer) (call $new (i32.mul (local.get $count) (i32.const 24))))
    (i32.store offset=4 (local.get $answer) (local.get $count))
    (local.get $answer))

  ;; (list<peer>)
  (func (export "wasmgate:policy/policy@0.2.0#learn") (param i32 i32))

  ;; (side, subjects: list<u32>, peers: list<u32>) -> matrix: one decision of 20 bytes, and a u16 for each cell.
  (func (export "wasmgate:policy/policy@0.2.0#decide")
    (param $side i32) (param i32) (param $subjects i32) (param i32) (param $peers i32) (result i32)
    (local $answer i32) (local $cells i32)
    (local.set $cells (i32.mul (local.get $subjects) (local.get $peers)))
    (local.set $answer (call $new (i32.const 16)))
    (i32.store (local.get $answer) (call $new (i32.const 20)))
    (i32.store offset=4 (local.get $answer) (i32.const 1))
    (i32.store offset=8 (local.get $answer) (call $new (i32.mul (local.get $cells) (i32.const 2))))
    (i32.store offset=12 (local.get $answer) (local.get $cells))
    (local.get $answer)))
